"""The Routing Mamba block: a Mamba block whose large projections are mixtures of experts behind one router."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from rom import ops
from rom.nn import mamba_weights
from rom.nn.routed_linear import RoutedLinear
from rom.nn.routing_losses import RoutingStatistics, routing_statistics

EXPERT_PROJECTIONS = ("in", "gate", "out")
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class RoutingMambaBlock(nn.Module):
    """Routing Mamba (RoM): one router picks, per token, the experts of the conv, gate and out projections.

    With the normalised input X, E experts and the top-K of P = softmax(X W_r), S the chosen and R_i = P_i on S:

        H = Σ_{i∈S} X W_in,i        G = SiLU(Σ_{i∈S} X W_gate,i)
        U = SiLU(conv1d(H))         Δ, B, C from U        Y = selective_scan(U, Δ, A, B, C, D)
        O = Σ_{i∈S} R_i · (Y ⊙ G) W_out,i

    Convolution, x_proj, dt_proj, A and D are shared: one state trajectory and one cache size whatever E and K. The
    weights R are not renormalised (with K = 1 the router would get no gradient) and multiply the out projection only;
    where "out" is not among the experts they multiply the outputs of the expert projections before their nonlinearity.
    `num_experts=1` is Mamba: no router, the same parameters under the same names.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias:
            as in mamba_ssm's `Mamba`, in its order. `dt_rank="auto"` is ceil(d_model / 16).
        num_experts: E; 1 is the dense block.
        top_k: K, experts per token.
        experts_on: which projections have experts, any subset of ("in", "gate", "out").
        normalize: renormalise the K chosen weights to sum 1.
        routed_scale: multiplies the routing weights.
        router_jitter: in training mode the router's input is multiplied by uniform noise in [1 − jitter, 1 + jitter]
            (Fedus et al., "Switch Transformers", 2021, 2.4); the paper needs none.
        layer_idx: kept as an attribute for callers that look for it.
        device, dtype: of the parameters. A_log, D, the bias of dt_proj and the router stay float32 in low precision,
            here and under `.to(...)`, `.half()`, `.bfloat16()`.

    Parameters: `in_proj.weight` (2·d_inner, d_model), the x half first, (E, 2·d_inner, d_model) with experts; where
    only one half has experts, `in_proj_x.weight` and `in_proj_z.weight`; `conv1d.weight` (d_inner, 1, d_conv),
    `conv1d.bias`, `x_proj.weight`, `dt_proj.weight`, `dt_proj.bias`, `A_log`, `D`, `out_proj.weight`, and
    `router.weight` (E, d_model).

    Raises:
        ValueError: num_experts < 1, top_k outside 1…num_experts, an unknown name in experts_on, or sizes < 1.

    Source: Zhan et al., "Routing Mamba: Scaling State Space Models with Mixture-of-Experts Projection" (2025),
    arXiv 2506.18145; Gu and Dao, "Mamba" (2023).

    >>> block = rom.RoutingMambaBlock(64, num_experts=4)
    >>> block(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    >>> block.load_statistics().fraction.sum()
    tensor(1.)
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        num_experts: int = 8,
        top_k: int = 1,
        experts_on: Iterable[str] = EXPERT_PROJECTIONS,
        normalize: bool = False,
        routed_scale: float = 1.0,
        router_jitter: float = 0.0,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.num_experts, self.top_k = num_experts, top_k
        chosen = set(experts_on)
        self.experts_on = tuple(name for name in EXPERT_PROJECTIONS if name in chosen)
        self.normalize, self.routed_scale, self.layer_idx = normalize, routed_scale, layer_idx
        self.router_jitter = router_jitter
        self._check_arguments(chosen, dt_init)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        float32 = {**factory, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        routed = {name: num_experts > 1 and name in self.experts_on for name in EXPERT_PROJECTIONS}

        def projection(has_experts: bool, inputs: int, outputs: int) -> nn.Module:
            if has_experts:
                return RoutedLinear(inputs, outputs, num_experts, bias=bias, **factory)
            return nn.Linear(inputs, outputs, bias=bias, **factory)

        if routed["in"] == routed["gate"]:
            self.in_proj = projection(routed["in"], d_model, 2 * self.d_inner)
        else:
            self.in_proj_x = projection(routed["in"], d_model, self.d_inner)
            self.in_proj_z = projection(routed["gate"], d_model, self.d_inner)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **factory
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=False, **factory)
        self.dt_proj.bias = nn.Parameter(torch.empty(self.d_inner, **float32))
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **float32))
        self.D = nn.Parameter(torch.ones(self.d_inner, **float32))
        self.out_proj = projection(routed["out"], self.d_inner, d_model)
        self.router = nn.Linear(d_model, num_experts, bias=False, **float32) if any(routed.values()) else None

        self._weight_on_out = routed["out"]
        # With experts on all three, rows stay sorted by expert between the two GEMMs; conv and scan index them.
        self._inner_rows: Literal["token", "expert"] = "expert" if all(routed.values()) else "token"
        self._last_routing: ops.Routing | None = None
        self._init_state_space(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self._mark_parameters()

    def _check_arguments(self, experts_on: set[str], dt_init: str) -> None:
        for name in ("d_model", "d_state", "d_conv", "d_inner", "dt_rank", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"RoutingMambaBlock: expected {name} >= 1, got {value!r}.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"RoutingMambaBlock: expected 1 <= top_k <= num_experts, got top_k={self.top_k} and "
                f"num_experts={self.num_experts}."
            )
        if unknown := sorted(experts_on - set(EXPERT_PROJECTIONS)):
            raise ValueError(
                f"RoutingMambaBlock: expected experts_on of {EXPERT_PROJECTIONS}, got {', '.join(unknown)}."
            )
        if self.num_experts > 1 and not experts_on:
            raise ValueError("RoutingMambaBlock: expected experts_on to name a projection; use num_experts=1 for none.")
        if self.num_experts == 1 and self.routed_scale != 1.0:
            raise ValueError(f"RoutingMambaBlock: expected routed_scale=1 with one expert, got {self.routed_scale}.")
        if not 0 <= self.router_jitter < 1:
            raise ValueError(f"RoutingMambaBlock: expected 0 <= router_jitter < 1, got {self.router_jitter}.")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"RoutingMambaBlock: expected dt_init 'random' or 'constant', got {dt_init!r}.")

    @torch.no_grad()
    def _init_state_space(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, floor: float) -> None:
        """Mamba's start: A = −(1…N) in every channel, and softplus(dt_proj.bias) log-uniform in [dt_min, dt_max]."""
        bound = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.rand_like(self.dt_proj.bias) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)
        dt = dt.exp().clamp(min=floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        steps = torch.arange(1, self.d_state + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        self.A_log.copy_(steps.log().expand_as(self.A_log))

    # ------------------------------------------------------------------------------------- parameters' dtype and marks
    def _float32_parameters(self) -> list[torch.Tensor]:
        router = () if self.router is None else (self.router.weight,)
        return [self.A_log, self.D, self.dt_proj.bias, *router]

    def _mark_parameters(self) -> None:
        """What optimizers and initialisers of Mamba models look for; new Parameter objects come without it."""
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoutingMambaBlock:
        """`.to`, `.half`, `.cuda`, …: a cast below float32 passes the float32 parameters by, a move does not."""
        kept = {id(t) for p in self._float32_parameters() for t in (p, p.grad) if t is not None}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            return tensor.to(out.device) if id(tensor) in kept and out.dtype in _LOW_PRECISION else out

        super()._apply(apply, recurse)
        self._mark_parameters()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After deepcopy and unpickling, which drop the parameters' marks."""
        super().__setstate__(state)
        self._mark_parameters()

    # ------------------------------------------------------------------------------------------------------- routing
    def router_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """X W_r for hidden (..., d_model): (tokens, num_experts) in float32 (float64), also under autocast.

        bfloat16 logits would tie and flip experts. A dense block has no router: ValueError.
        """
        if self.router is None:
            raise ValueError("RoutingMambaBlock: a block without experts (num_experts=1) has no router.")
        weight = self.router.weight
        tokens = hidden.reshape(-1, self.d_model).to(weight.dtype)
        if self.training and self.router_jitter:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.router_jitter, 1 + self.router_jitter)
        if not torch.is_autocast_enabled(tokens.device.type):
            return F.linear(tokens, weight)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens, weight)

    def route(self, hidden: torch.Tensor) -> ops.Routing | None:
        """The routing `forward` would use for hidden (..., d_model); None for a block without experts."""
        if self.router is None:
            return None
        return ops.route(self.router_logits(hidden), self.top_k, self.normalize, self.routed_scale)

    def _checked_routing(self, tokens: torch.Tensor, routing: ops.Routing | None) -> ops.Routing | None:
        """The given routing, or the block's own; remembers its load."""
        if routing is None:
            routing = self.route(tokens)
        elif self.router is None:
            raise ValueError(
                "RoutingMambaBlock: expected routing=None, a block without experts (num_experts=1) uses none."
            )
        elif not isinstance(routing, ops.Routing):
            raise TypeError(f"RoutingMambaBlock: expected routing to be a rom.Routing, got {type(routing).__name__}.")
        elif (routing.num_tokens, routing.num_experts) != (tokens.shape[0], self.num_experts):
            raise ValueError(
                f"RoutingMambaBlock: expected a routing of {tokens.shape[0]} tokens over {self.num_experts} experts, "
                f"got one of {routing.num_tokens} over {routing.num_experts}. Use the routing of this very batch."
            )
        if routing is not None and not torch.compiler.is_exporting():
            self._last_routing = routing._replace(weights=routing.weights.detach(), probs=routing.probs.detach())
        return routing

    def load_statistics(self) -> RoutingStatistics | None:
        """How the last forward or step spread its tokens over the experts; None before it and without experts."""
        return None if self._last_routing is None else routing_statistics(self._last_routing)

    # ------------------------------------------------------------------------------------------------------- forward
    def forward(
        self,
        hidden: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
        cu_seqlens: torch.Tensor | None = None,
        routing: ops.Routing | None = None,
        return_routing: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ops.Routing | None]:
        """Mixes whole sequences.

        Args:
            hidden: `[batch, length, d_model]`, normalised input.
            cache: `(conv_state, ssm_state)` from `allocate_inference_cache`: the sequences continue from it, and it is
                updated in place (no gradient flows into it). With cu_seqlens its batch is the number of sequences.
            cu_seqlens: `[sequences + 1]` int32, boundaries of packed sequences; batch must be 1.
            routing: use this routing of the same tokens instead of the own router's (another layer's, for instance).
            return_routing: also return the routing used, None for a block without experts.

        Returns:
            `[batch, length, d_model]`, or `(out, routing)` with return_routing.

        Raises:
            ValueError: hidden's width, the states' or cu_seqlens' shape, or a routing of another batch.
        """
        self._check_hidden(hidden)
        tokens = hidden.reshape(-1, self.d_model)
        routing = self._checked_routing(tokens, routing)
        x, z = self._project_in(tokens, routing, self._inner_rows)
        row_index = None
        if self._inner_rows == "expert":
            assert routing is not None
            row_index = routing.inv.view(*hidden.shape[:2], routing.top_k)
        else:
            x, z = (t.view(*hidden.shape[:2], self.d_inner) for t in (x, z))
        y = self._mix(x, z, cache, cu_seqlens, row_index)
        out = self._project_out(y, routing, self._inner_rows).view(hidden.shape)
        return (out, routing) if return_routing else out

    def _check_hidden(self, hidden: torch.Tensor) -> None:
        if hidden.dim() != 3 or hidden.shape[-1] != self.d_model:
            expected = f"hidden of shape (batch, length, {self.d_model})"
            raise ValueError(f"RoutingMambaBlock: expected {expected}, got {tuple(hidden.shape)}.")

    def _mix(
        self,
        x: torch.Tensor,
        z: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None,
        cu_seqlens: torch.Tensor | None,
        row_index: torch.Tensor | None,
    ) -> torch.Tensor:
        """Convolution, scan and gate over the sequence; with row_index, x, z and the result are expert rows."""
        conv_state, ssm_state = _initial_states(cache)
        u, conv_final = ops.causal_conv1d(
            x, self._conv_weight(), self.conv1d.bias, "silu", conv_state, cu_seqlens, True, row_index
        )
        delta, B, C = self._scan_inputs(u)
        y, ssm_final = ops.selective_scan(
            u,
            delta,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=ssm_state,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
            row_index=row_index,
        )
        if cache is not None:
            cache[0].copy_(conv_final.detach())
            cache[1].copy_(ssm_final.detach())
        return y

    def _project_in(
        self, tokens: torch.Tensor, routing: ops.Routing | None, rows: Literal["token", "expert"]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"weighted": not self._weight_on_out, "rows_out": rows}
        if hasattr(self, "in_proj"):
            x, z = _project(self.in_proj, tokens, routing, **options).split(self.d_inner, dim=-1)
            return x, z
        return (
            _project(self.in_proj_x, tokens, routing, **options),
            _project(self.in_proj_z, tokens, routing, **options),
        )

    def _project_out(
        self, y: torch.Tensor, routing: ops.Routing | None, rows: Literal["token", "expert"]
    ) -> torch.Tensor:
        return _project(self.out_proj, y.reshape(-1, self.d_inner), routing, weighted=True, rows_in=rows)

    def _conv_weight(self) -> torch.Tensor:
        return self.conv1d.weight.view(self.d_inner, self.d_conv)

    def _scan_inputs(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """delta (before bias and softplus), B and C: the input-dependent half of the state space."""
        dt, B, C = F.linear(u, self.x_proj.weight).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(dt, self.dt_proj.weight), B, C

    # ------------------------------------------------------------------------------------------------------- decoding
    def allocate_inference_cache(
        self, batch: int, max_seqlen: int = 0, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Zero states for `batch` sequences: conv `[batch, d_inner, d_conv]`, ssm `[batch, d_inner, d_state]`.

        max_seqlen is not needed (the state has one size) and taken for mamba_ssm's signature. dtype is the
        convolution state's, default conv1d.weight's; the scan's state is float32 (float64 for a float64 block).
        """
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch, self.d_inner, self.d_conv, dtype=dtype or weight.dtype)
        ssm_state = self.A_log.new_zeros(batch, self.d_inner, self.d_state)
        return conv_state, ssm_state.detach()

    def step(
        self,
        hidden: torch.Tensor,
        conv_state: torch.Tensor,
        ssm_state: torch.Tensor,
        routing: ops.Routing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One more token per sequence (or a few): hidden `[batch, 1, d_model]`; both states are updated in place.

        Returns `(out, conv_state, ssm_state)` as mamba_ssm's `Mamba.step`; out has hidden's shape. No gradients.
        """
        self._check_hidden(hidden)
        tokens = hidden.reshape(-1, self.d_model)
        routing = self._checked_routing(tokens, routing)
        x, z = (t.view(*hidden.shape[:2], self.d_inner) for t in self._project_in(tokens, routing, "token"))
        u = ops.causal_conv1d_update(x, conv_state, self._conv_weight(), self.conv1d.bias, "silu")
        delta, B, C = self._scan_inputs(u)
        y = ops.selective_state_update(
            ssm_state, u, delta, -torch.exp(self.A_log), B, C, self.D, z, self.dt_proj.bias, delta_softplus=True
        )
        return self._project_out(y, routing, "token").view(hidden.shape), conv_state, ssm_state

    # ------------------------------------------------------------------------------------------------------ upcycling
    @classmethod
    def from_mamba(
        cls,
        source: nn.Module | Mapping[str, torch.Tensor],
        num_experts: int = 1,
        noise: float = 0.0,
        **options: Any,
    ) -> RoutingMambaBlock:
        """A block from a Mamba block's weights; with experts, each starts as a copy of them ("upcycling").

        Args:
            source: mamba_ssm's `Mamba`, Hugging Face's `MambaMixer`, a dense `RoutingMambaBlock`, or a state dict.
            num_experts: E; 1 copies the block as it is.
            noise: standard deviation of Gaussian noise on each copy, relative to the weight's own.
            options: further arguments of the constructor (top_k, experts_on, device, …).

        routed_scale defaults to E / K (1 with `normalize`) and the router starts near zero, so that P ≈ 1/E and the
        output starts at the dense block's, exactly so at W_r = 0. Projections that are summed without a weight are
        divided by K.

        Raises:
            ValueError: missing or unexpected keys, or shapes that do not fit together.
        """
        state = mamba_weights.state_of(source)
        sizes = mamba_weights.block_sizes(state)
        sizes |= {"dtype": state["in_proj.weight"].dtype, "device": state["in_proj.weight"].device}
        sizes |= mamba_weights.upcycled_scale(num_experts, options)
        block = cls(**{**sizes, **options}, num_experts=num_experts)
        mamba_weights.load_dense(block, state, noise)
        return block

    def extra_repr(self) -> str:
        """The sizes that the submodules do not show."""
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, experts_on={self.experts_on}, d_state={self.d_state}"
        )


def _project(layer: nn.Module, x: torch.Tensor, routing: ops.Routing | None, **options: Any) -> torch.Tensor:
    """A projection with or without experts."""
    return layer(x, routing, **options) if isinstance(layer, RoutedLinear) else layer(x)


def _initial_states(
    cache: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The cache's states; copies where autograd would keep them, since the cache is about to be overwritten."""
    if cache is None:
        return None, None
    return (cache[0].clone(), cache[1].clone()) if torch.is_grad_enabled() else cache
