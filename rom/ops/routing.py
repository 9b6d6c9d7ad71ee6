"""`route`: from router logits to everything the routed projections of a block need, and `Routing`, which holds it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from rom import dispatch, native
from rom.ops import _op
from rom.reference import routing as reference


class Routing(NamedTuple):
    """Which experts every token goes to, with which weight, and the order in which the experts see the tokens.

    A slot is (token t, choice k), numbered t·K + k. A row is a place in expert order: the slots sorted by expert, then
    by slot. Immutable; built by `rom.ops.route`, once for all projections that share the decision.

    Fields (T tokens, K = top_k, E experts; the floating ones are differentiable):
        indices: `[T, K]` int32, the experts of each token, best first.
        weights: `[T, K]` float32, their weights.
        counts: `[E]` int32, slots per expert.
        offsets: `[E + 1]` int32, the first row of each expert; the last entry is T·K.
        perm: `[T·K]` int32, the slot in each row.
        inv: `[T, K]` int32, the row of each slot.
        probs: `[T, E]` float32, softmax of the logits.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    perm: torch.Tensor
    inv: torch.Tensor
    probs: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T, the tokens of the batch it was built for."""
        return self.indices.shape[0]

    @property
    def num_experts(self) -> int:
        """E, the experts to choose from."""
        return self.counts.shape[0]

    @property
    def top_k(self) -> int:
        """K, the experts each token goes to."""
        return self.indices.shape[1]


def route(logits: torch.Tensor, top_k: int, normalize: bool = False, routed_scale: float = 1.0) -> Routing:
    """Sends every token to its `top_k` best experts.

        P = softmax(logits);   S = the top_k largest logits;   weights = routed_scale · P[S]   (/ Σ P[S] if normalize)

    Args:
        logits: `[T, E]`, float32, bfloat16, float16 or float64. Compute them in float32: rounded logits tie.
        top_k: experts per token, 1 … E.
        normalize: divide the weights by their sum. With top_k = 1 they are then constant: no gradient for the router.
        routed_scale: factor on the weights.

    Returns:
        `rom.Routing`. Softmax runs over all experts in float32 (float64 for float64 logits, fields included).
        Selection is on the logits and ties go to the lower index: the same choice on every device and backend.
        Gradients flow to the logits through `weights` and `probs`.
        A NaN counts as the largest logit and makes the token's weights and probs NaN; the integers stay valid.

    Raises:
        ValueError: logits are not `[T, E]` with E ≥ 1, or top_k is not in 1 … E. TypeError: a dtype is not floating.

    Source: "Routing Mamba" (arXiv 2506.18145), router and top-K; Shazeer et al. (arXiv 1701.06538).

    >>> routing = rom.ops.route(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]]), top_k=1)
    >>> routing.indices.tolist(), routing.counts.tolist(), routing.perm.tolist()
    ([[1], [0]], [1, 1, 0], [1, 0])
    >>> routing.weights
    tensor([[0.6652],
            [0.4879]])
    """
    _validate(logits, top_k)
    backend = dispatch.choose("route", logits.device.type)
    if backend == "reference" and not torch.compiler.is_compiling():
        return Routing(*reference.route(logits, top_k, normalize, routed_scale))
    # The op's first output is a floating one, as opcheck wants it.
    weights, indices, *others = torch.ops.rom.route(logits, top_k, normalize, routed_scale, backend)
    return Routing(indices, weights, *others)


def _validate(logits: torch.Tensor, top_k: int) -> None:
    _op.check_tensors("route", "logits", logits=logits)
    _op.check_floating("route", "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        _op.fail("route", "logits of shape (tokens, experts) with at least one expert", str(_op.shape(logits)))
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"rom.ops.route: expected top_k to be an int, got {type(top_k).__name__}.")
    if not 1 <= top_k <= logits.shape[1]:
        _op.fail("route", f"top_k in 1 … {logits.shape[1]} (the number of experts)", str(top_k))
    # Not while tracing: it would bound the batch of an exported program. The kernel checks again.
    if not torch.compiler.is_compiling() and logits.shape[0] * top_k >= 2**31:
        _op.fail("route", "tokens × top_k below 2147483648 (rows are int32)", f"{logits.shape[0]} × {top_k}")


# ------------------------------------------------------------------------------------------------ implementations
_REAL = ("weights", "probs")
_TRITON = "rom.triton_kernels.routing"


def _shapes(logits: torch.Tensor, top_k: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of indices, weights, counts, offsets, perm, inv, probs."""
    tokens, experts = logits.shape
    slots = (tokens, top_k)
    return slots, slots, (experts,), (experts + 1,), (tokens * top_k,), slots, (tokens, experts)


def _kernel_forward(
    kernels: _op.Kernels, logits: torch.Tensor, top_k: int, normalize: bool, routed_scale: float
) -> reference.Tensors:
    real, integer = _op.compute_dtype(logits.dtype), torch.int32
    fields = {
        name: native.empty(shape, real if name in _REAL else integer, logits.device)
        for name, shape in zip(Routing._fields, _shapes(logits, top_k))
    }
    scalars = {"normalize": int(normalize), "routed_scale": routed_scale}
    arguments = {"logits": logits.contiguous(), **fields, **scalars}
    workspace = kernels.workspace("route_forward", logits.device, **arguments)
    kernels.call("route_forward", logits.device, workspace=workspace, **arguments)
    return tuple(fields.values())


def _kernel_backward(
    kernels: _op.Kernels,
    probs: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    grad_weights: torch.Tensor,
    grad_probs: torch.Tensor | None,
    normalize: bool,
    routed_scale: float,
) -> torch.Tensor:
    grad_logits = native.empty(probs.shape, probs.dtype, probs.device)
    kernels.call(
        "route_backward",
        probs.device,
        probs=probs,
        indices=indices,
        weights=weights,
        grad_weights=grad_weights.contiguous(),
        grad_probs=None if grad_probs is None else grad_probs.contiguous(),
        grad_logits=grad_logits,
        normalize=int(normalize),
        routed_scale=routed_scale,
    )
    return grad_logits


def _reference_backward(
    probs: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    grad_weights: torch.Tensor,
    grad_probs: torch.Tensor | None,
    normalize: bool,
    routed_scale: float,
) -> torch.Tensor:
    chosen = indices.long()
    if normalize:  # w = scale · p / Σp
        total = probs.gather(-1, chosen).sum(-1, keepdim=True)
        grad = (grad_weights * routed_scale - (grad_weights * weights).sum(-1, keepdim=True)) / total
    else:
        grad = grad_weights * routed_scale
    grad = (torch.zeros_like(probs) if grad_probs is None else grad_probs).scatter_add(-1, chosen, grad)
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))


for _backend, _kernels, _names, _module in (
    ("triton", _op.Triton(_TRITON), (), _TRITON),
    ("cpu", native, ("route_forward", "route_backward"), None),
):
    _run, _run_back = partial(_kernel_forward, _kernels), partial(_kernel_backward, _kernels)
    dispatch.register("route", _backend, _run, _run_back, kernels=_names, module=_module)
dispatch.register("route", "reference", reference.route, _reference_backward)


# ------------------------------------------------------------------------------------------------ registration
_op.define(
    "route(Tensor logits, int top_k, bool normalize, float routed_scale, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_op.define(
    "route_backward(Tensor probs, Tensor indices, Tensor weights, Tensor grad_weights, Tensor? grad_probs,"
    " bool normalize, float routed_scale, str backend) -> Tensor"
)


def _forward(logits: torch.Tensor, top_k: int, normalize: bool, routed_scale: float, backend: str) -> reference.Tensors:
    indices, weights, *others = dispatch.implementation("route", backend).forward(
        logits, top_k, normalize, routed_scale
    )
    return weights, indices, *others


def _backward(
    probs: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    grad_weights: torch.Tensor,
    grad_probs: torch.Tensor | None,
    normalize: bool,
    routed_scale: float,
    backend: str,
) -> torch.Tensor:
    run = dispatch.implementation("route", backend).backward
    assert run is not None
    return run(probs, indices, weights, grad_weights, grad_probs, normalize, routed_scale)


_op.LIBRARY.impl("route", _forward, "CompositeExplicitAutograd")
_op.LIBRARY.impl("route_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rom::route")
def _(logits, top_k, normalize, routed_scale, backend):  # type: ignore[no-untyped-def]
    real, integer = _op.compute_dtype(logits.dtype), torch.int32
    fields = zip(Routing._fields, _shapes(logits, top_k))
    indices, weights, *others = (
        logits.new_empty(shape, dtype=real if name in _REAL else integer) for name, shape in fields
    )
    return weights, indices, *others


@torch.library.register_fake("rom::route_backward")
def _(probs, indices, weights, grad_weights, grad_probs, normalize, routed_scale, backend):  # type: ignore[no-untyped-def]
    return probs.new_empty(probs.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, _, ctx.normalize, ctx.routed_scale, ctx.backend = inputs
    weights, indices, *integers, probs = output
    ctx.save_for_backward(probs, indices, weights)
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(indices, *integers)
    ctx.set_materialize_grads(False)


def _autograd(ctx, *grads):  # type: ignore[no-untyped-def]
    probs, indices, weights = ctx.saved_tensors
    grad_weights, *_, grad_probs = grads
    if grad_weights is None:
        if grad_probs is None:
            return None, None, None, None, None
        grad_weights = torch.zeros_like(weights)
    grad = torch.ops.rom.route_backward(
        probs, indices, weights, grad_weights, grad_probs, ctx.normalize, ctx.routed_scale, ctx.backend
    )
    return grad.to(ctx.dtype), None, None, None, None


torch.library.register_autograd("rom::route", _autograd, setup_context=_setup)
