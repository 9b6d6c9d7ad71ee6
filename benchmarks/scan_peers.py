"""The selective scan by others: what each needs of its inputs, in the layout it likes best.

Every peer answers `(call, canonical)`: the call to time, and how its results become ours: out, then the gradients of
u, delta, A, B, C, D, z, delta_bias.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from harness import Contender, Tensors
from torch import Tensor
from torch.nn.functional import silu, softplus

import rom

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@dataclass
class Problem:
    """The arguments of one scan, channel-last, and the gradient that comes from above."""

    arguments: dict[str, Tensor]
    grad: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
        """As at the start of training, but with A moved off the integers −1 … −N: no trick with powers is timed."""
        batch, length, dim, state = shape
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=generator, device=device) * scale

        rates = torch.arange(1, state + 1, device=device).float() * torch.exp(normal(dim, state, scale=0.2))
        step = torch.exp(torch.rand(dim, generator=generator, device=device) * 4.6 - 6.9)  # 1e-3 … 1e-1, log-uniform
        values = {
            "u": normal(batch, length, dim), "delta": normal(batch, length, dim, scale=0.5), "A": -rates,
            "B": normal(batch, length, state), "C": normal(batch, length, state), "D": torch.ones(dim, device=device),
            "z": normal(batch, length, dim), "delta_bias": step + torch.log(-torch.expm1(-step)),
        }  # fmt: skip
        grad = normal(batch, length, dim).to(dtype)
        parameters = ("A", "D", "delta_bias")
        return cls({n: v.to(torch.float32 if n in parameters else dtype) for n, v in values.items()}, grad)

    def double(self) -> Problem:
        """The same numbers in float64."""
        return Problem({n: v.double() for n, v in self.arguments.items()}, self.grad.double())

    def truncated(self, length: int) -> Problem:
        """Its first time steps."""
        by_time = {n: v[:, :length] if v.dim() == 3 else v for n, v in self.arguments.items()}
        return Problem(by_time, self.grad[:, :length])

    def channel_first(self) -> Problem:
        """(batch, channel, length) in memory, as mamba-ssm and its descendants want it."""
        return Problem({n: _swap(v) for n, v in self.arguments.items()}, _swap(self.grad))


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous() if x.dim() == 3 else x


def _swap_all(results: Tensors) -> Tensors:
    return tuple(x.transpose(1, 2) if x.dim() == 3 else x for x in results)


def timed(function: Callable[..., Tensor], problem: Problem, backward: bool) -> Callable[[], Tensors]:
    """The call: the output alone, or the output and the gradient of every argument."""
    if not backward:

        def forward() -> Tensors:
            with torch.no_grad():
                return (function(**problem.arguments),)

        return forward
    leaves = {n: v.detach().requires_grad_() for n, v in problem.arguments.items()}

    def both() -> Tensors:
        out = function(**leaves)
        return (out, *torch.autograd.grad(out, list(leaves.values()), problem.grad))

    return both


# ------------------------------------------------------------------------------------------------ the scans
def ours(**arguments: Tensor) -> Tensor:
    return rom.ops.selective_scan(**arguments, delta_softplus=True)


def unbind_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The leanest page of torch: step after step over `unbind` (indexing costs O(length²) backward)."""
    delta = softplus(delta + delta_bias)
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
        ys.append((h @ C_t[..., None])[..., 0])
    return (torch.stack(ys, 1) + D * u) * silu(z)


def discretised_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """mamba-ssm's `selective_scan_ref` with `unbind` for its indexing: exp(δA) and δBu of all steps, then the loop.

    What most ports do; (batch, length, dim, state) goes through memory, and fresh pages cost as much as the arithmetic.
    """
    delta = softplus(delta + delta_bias)
    a, b = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for a_t, b_t, C_t in zip(a.unbind(1), b.unbind(1), C.unbind(1)):
        h = a_t * h + b_t
        ys.append((h @ C_t[..., None])[..., 0])
    return (torch.stack(ys, 1) + D * u) * silu(z)


@cache
def _compiled_step() -> Callable[..., tuple[Tensor, Tensor]]:
    def step(
        h: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        delta = softplus(delta + delta_bias)[..., None]
        h = torch.exp(delta * A) * h + delta * u[..., None] * B[:, None]
        return h, (h * C[:, None]).sum(-1)

    return torch.compile(step, dynamic=False)


def compiled_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """A Python loop around a step that torch.compile fused."""
    step, ys = _compiled_step(), []
    h = u.new_zeros(u.shape[0], *A.shape)
    for u_t, delta_t, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        h, y = step(h, u_t, delta_t, A, B_t, C_t, delta_bias)
        ys.append(y)
    return (torch.stack(ys, 1) + D * u) * silu(z)


def mambapy(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """mamba.py's parallel scan, used as its own Mamba block uses it (alxndrTL/mamba.py, MIT)."""
    from mambapy.pscan import pscan

    delta = softplus(delta + delta_bias)
    a = torch.exp(delta[..., None] * A)
    b = (delta * u)[..., None] * B[:, :, None]
    return ((pscan(a, b) @ C[..., None])[..., 0] + D * u) * silu(z)


def hugging_face(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """What `transformers` runs where mamba-ssm is not installed; channel-first."""
    from transformers.models.mamba import modeling_mamba

    scan = modeling_mamba.mamba_selective_scan
    scan = getattr(scan, "__wrapped__", scan)  # past the hub kernels: the torch code below them
    return scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True)


class _MambaScan(torch.autograd.Function):
    """mamba-ssm's two kernels, as its own `selective_scan_fn` calls them, without the package around them."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias):  # type: ignore[no-untyped-def]
        import selective_scan_cuda

        B, C = B.unsqueeze(1), C.unsqueeze(1)  # one group
        out, states, gated = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, states, out)
        return gated

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        import selective_scan_cuda

        *inputs, states, out = ctx.saved_tensors
        found = selective_scan_cuda.bwd(*inputs, grad, states, out, None, True, False)
        du, ddelta, dA, dB, dC, dD, dbias, dz = found
        return du, ddelta, dA, dB.squeeze(1), dC.squeeze(1), dD, dz, dbias


def mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """mamba-ssm's CUDA kernels; channel-first."""
    return _MambaScan.apply(u, delta, A, B, C, D, z, delta_bias)


# ------------------------------------------------------------------------------------------------ the contenders
def _missing(module: str, remedy: str) -> str:
    return "" if importlib.util.find_spec(module) else f"{module} is not installed; {remedy}"


def reference(problem: Problem, backward: bool) -> Tensors:
    """Float64, by the unbind loop: ours is judged by code that is not ours."""
    return timed(unbind_loop, problem.double(), backward)()


def contender(name: str, problem: Problem, backward: bool) -> Contender:
    """One of ROSTER, ready for `problem`."""
    function, module, channel_first, remedy = ROSTER[name]
    missing = _missing(module, remedy) if module else ""
    if name == "mamba_ssm" and not missing and not torch.cuda.is_available():
        missing = "mamba_ssm has no CPU kernel"
    if missing:
        return Contender(name, missing=missing)
    given = problem.channel_first() if channel_first else problem
    return Contender(
        name,
        make=lambda: timed(function, given, backward),
        canonical=_swap_all if channel_first else lambda results: results,
        predict=(lambda: _predict_quadratic(function, problem)) if name == "Hugging Face" and backward else None,
    )


def _predict_quadratic(function: Callable[..., Tensor], problem: Problem) -> float:
    """Seconds of a backward pass that indexes step by step, from a short sequence: it is quadratic in the length."""
    import time

    length, short = problem.grad.shape[1], min(problem.grad.shape[1], 64)
    call = timed(function, problem.truncated(short).channel_first(), True)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * (length / short) ** 2


PIP = "`pip install 'rom-kernels[bench]'`"
# name: (scan, module it needs, whether channel-first, how to get it)
ROSTER: dict[str, tuple[Callable[..., Tensor], str, bool, str]] = {
    "rom": (ours, "", False, ""),
    "torch loop": (unbind_loop, "", False, ""),
    "discretised loop": (discretised_loop, "", False, ""),
    "compiled step": (compiled_step, "", False, ""),
    "mambapy": (mambapy, "mambapy", False, PIP),
    "Hugging Face": (hugging_face, "transformers", True, PIP),
    "mamba_ssm": (
        mamba_ssm,
        "selective_scan_cuda",
        True,
        "`MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation`, or benchmarks/build_peers.py",
    ),
}
