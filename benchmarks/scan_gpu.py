"""The GPU's cases of the selective scan: sizes at which no torch loop can follow, and decoding inside a CUDA graph.

At these sizes results are checked on slices: a few channels over all sequences and steps, the gradient of B on the last
steps (it needs no state) and that of C on the first ones (it needs no future). Each slice is exact by itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import torch
from harness import Case, Contender, Cost, Target, Tensors
from scan_peers import Problem, contender, mamba_ssm, ours, unbind_loop
from torch import Tensor
from torch.nn.functional import silu, softplus

import rom

Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(8, 2048, 4096, 16), (1, 65536, 4096, 16), (16, 4096, 2048, 16)]
QUICK_SHAPES: list[Shape] = [(2, 512, 512, 16)]
DECODE = [(1, 8192, 16), (128, 8192, 16)]  # batch, channels, states
BACKENDS = {"rom cuda": "cuda", "rom triton": "triton"}
CHANNELS, EDGE = 4, 64  # of the slices
COLD_BYTES = 256 * 2**20  # states in turn, as of a model's layers, until the cache holds none of them

# Instructions per (b, l, d, n) of the leanest prototype, softplus, gate and stores included: a floor, so of one that
# leaves all exponentials to MUFU. What the kernels compile to is counted in tests/gates.
FORWARD_SLOTS, BACKWARD_SLOTS = 7.4, 20.8
# Exponentials per (b, l, d) beside the state's: softplus and SiLU, each an exponential and a reciprocal or logarithm.
FORWARD_EXPS, BACKWARD_EXPS = 4, 5
# Forward, 3 of 16 exponentials can run on the FMA pipe before issue slots bind; backward, issue slots bind anyway.
ON_MUFU = 13 / 16


def cost(shape: Shape, dtype: torch.dtype, backward: bool) -> Cost:
    """Forward u, delta, z, out through memory; backward u, delta, z, out, grad and three gradients."""
    batch, length, dim, state = shape
    rows = batch * length * dim
    if backward:
        return Cost(rows * state * BACKWARD_SLOTS, rows * (state + BACKWARD_EXPS), 8 * rows * dtype.itemsize)
    return Cost(rows * state * FORWARD_SLOTS, rows * (state * ON_MUFU + FORWARD_EXPS), 4 * rows * dtype.itemsize)


# ------------------------------------------------------------------------------------------------ the slices
def by_doubling(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan in log2(length) passes over (batch, length, dim, state): for a few channels, and differentiable."""
    delta = softplus(delta + delta_bias)
    a, h = torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None]
    step = 1
    while step < h.shape[1]:  # after it, h holds the sums over the last 2·step steps
        h = torch.cat([h[:, :step], torch.addcmul(h[:, step:], a[:, step:], h[:, :-step])], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    return ((h @ C[..., None])[..., 0] + D * u) * silu(z)


def channels(problem: Problem) -> Tensor:
    """The channels that are looked at, first and last among them."""
    dim = problem.arguments["D"].shape[0]
    return torch.linspace(0, dim - 1, min(CHANNELS, dim), device=problem.grad.device).round().long()


def narrowed(problem: Problem) -> Problem:
    """The problem of those channels alone."""
    index, arguments = channels(problem), dict(problem.arguments)
    for name in ("u", "delta", "z"):
        arguments[name] = arguments[name][..., index]
    for name in ("A", "D", "delta_bias"):
        arguments[name] = arguments[name][index]
    return Problem(arguments, problem.grad[..., index])


def at_edge(problem: Problem, last: bool) -> Problem:
    """The first sequence's first or last EDGE steps, all channels."""
    steps = slice(-EDGE, None) if last else slice(EDGE)
    arguments = {n: v[:1, steps] if v.dim() == 3 else v for n, v in problem.arguments.items()}
    return Problem(arguments, problem.grad[:1, steps])


def _gradients(function: Callable[..., Tensor], problem: Problem, names: tuple[str, ...]) -> Tensors:
    problem = problem.double()
    leaves = {n: v.detach().requires_grad_(n in names) for n, v in problem.arguments.items()}
    return torch.autograd.grad(function(**leaves), [leaves[n] for n in names], problem.grad)


def expected_forward(problem: Problem) -> Tensors:
    """out of `channels`, float64."""
    with torch.no_grad():
        return (by_doubling(**narrowed(problem).double().arguments),)


def expected_backward(problem: Problem) -> Tensors:
    """What `seen_backward` leaves of the gradients, float64."""
    by_channel = _gradients(by_doubling, narrowed(problem), ("u", "delta", "A", "D", "z", "delta_bias"))
    (grad_B,) = _gradients(unbind_loop, at_edge(problem, last=True), ("B",))
    (grad_C,) = _gradients(unbind_loop, at_edge(problem, last=False), ("C",))
    return (*by_channel, grad_B, grad_C)


def seen_forward(problem: Problem, results: Tensors) -> Tensors:
    return (results[0][..., channels(problem)],)


def seen_backward(problem: Problem, results: Tensors) -> Tensors:
    """The slices of the gradients of u, delta, A, B, C, D, z, delta_bias."""
    index = channels(problem)
    du, ddelta, dA, dB, dC, dD, dz, dbias = results
    by_channel = (du[..., index], ddelta[..., index], dA[index], dD[index], dz[..., index], dbias[index])
    return (*by_channel, dB[:1, -EDGE:], dC[:1, :EDGE])


# ------------------------------------------------------------------------------------------------ sequences
def _unavailable(op: str, backend: str) -> str:
    return next(row.reason for row in rom.backends() if (row.op, row.backend) == (op, backend))


def _forward(function: Callable[..., Tensor], problem: Problem) -> Callable[[], Tensors]:
    def call() -> Tensors:
        with torch.no_grad():
            return (function(**problem.arguments),)

    return call


def _backward(function: Callable[..., Tensor], problem: Problem) -> Callable[[], Tensors]:
    """The backward pass alone, of a forward pass that is over."""
    leaves = {n: v.detach().requires_grad_() for n, v in problem.arguments.items()}
    out, wanted = function(**leaves), list(leaves.values())
    return lambda: torch.autograd.grad(out, wanted, problem.grad, retain_graph=True)


def sequence(shape: Shape, dtype: torch.dtype, backward: bool, device: str) -> Case:
    """Forward, or backward alone: ours by backend, and mamba-ssm in its own layout."""
    problem = Problem.random(shape, dtype, device)
    seen, prepare = (seen_backward, _backward) if backward else (seen_forward, _forward)

    def by_backend(name: str, backend: str) -> Contender:
        if reason := _unavailable("selective_scan", backend):
            return Contender(name, missing=reason)

        def scan(**arguments: Tensor) -> Tensor:
            with rom.backend(backend):
                return ours(**arguments)

        return Contender(name, lambda: prepare(scan, problem), canonical=lambda results: seen(problem, results))

    mamba = contender("mamba_ssm", problem, backward)
    if mamba.make is not None:
        to_ours = mamba.canonical
        mamba.canonical = lambda results: seen(problem, to_ours(results))
        mamba.make = lambda: prepare(mamba_ssm, problem.channel_first())
    entries = [*(by_backend(name, backend) for name, backend in BACKENDS.items()), mamba]
    entries.sort(key=lambda entry: entry.make is None)  # ratios are to the first: ours, if it is here
    expected = expected_backward if backward else expected_forward
    kind = "backward" if backward else "forward"
    return Case(kind, str(shape), entries, lambda: expected(problem), dtype, cost(shape, dtype, backward))


# ------------------------------------------------------------------------------------------------ decode
def _graph(call: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """The call recorded once and replayed; its first results stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Tensors:
        graph.replay()
        return results

    return replay


Update = Callable[[Tensor, dict[str, Tensor]], Tensor]


def by_rom(state: Tensor, token: dict[str, Tensor]) -> Tensor:
    return rom.ops.selective_state_update(state, **token, delta_softplus=True)


def by_mamba_ssm(state: Tensor, token: dict[str, Tensor]) -> Tensor:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    renamed = {{"u": "x", "delta": "dt", "delta_bias": "dt_bias"}.get(n, n): v for n, v in token.items()}
    return selective_state_update(state, **renamed, dt_softplus=True)


def _mamba_ssm_missing() -> str:
    try:
        from mamba_ssm.ops.triton import selective_state_update  # noqa: F401
    except ImportError as error:
        return f"mamba_ssm's decode step cannot be imported ({error})"
    return ""


def decode(size: tuple[int, int, int], dtype: torch.dtype, device: str, graph: bool) -> Case:
    """One token for every sequence, layer after layer, each with a state of its own; times are for one layer."""
    batch, dim, state_size = size
    problem = Problem.random((batch, 1, dim, state_size), dtype, device)
    token = {n: v[:, 0] if v.dim() == 3 else v for n, v in problem.arguments.items()}
    start = torch.randn(batch, dim, state_size, device=device)
    layers = max(4, math.ceil(COLD_BYTES / start.nbytes)) if device == "cuda" else 2

    def entry(name: str, update: Update, missing: str, backend: str = "auto") -> Contender:
        def make() -> Callable[[], Tensors]:
            states = [start.clone() for _ in range(layers)]

            def call() -> Tensors:
                with torch.no_grad(), rom.backend(backend):
                    outs = [update(state, token) for state in states]
                return outs[0], states[0]

            recorded = _graph(call) if graph else call
            for state in states:
                state.copy_(start)
            return recorded

        return Contender(name, missing=missing) if missing else Contender(name, make, repeats=layers)

    def expected() -> Tensors:
        double = problem.double()
        now = {n: v[:, 0] if v.dim() == 3 else v for n, v in double.arguments.items()}
        delta = softplus(now["delta"] + now["delta_bias"])[..., None]
        after = torch.exp(delta * now["A"]) * start.double() + delta * now["u"][..., None] * now["B"][:, None]
        out = (after @ now["C"][..., None])[..., 0] + now["D"] * now["u"]
        return out * silu(now["z"]), after

    by_backend = [
        entry(name, by_rom, _unavailable("selective_state_update", backend), backend)
        for name, backend in BACKENDS.items()
    ]
    entries = [*by_backend, entry("mamba_ssm", by_mamba_ssm, _mamba_ssm_missing())]
    entries.sort(key=lambda contender: contender.make is None)
    elements = batch * dim * state_size
    moved = Cost(elements * 6, elements, batch * dim * (8 * state_size + 4 * dtype.itemsize))
    return Case("decode, CUDA graph" if graph else "decode", str(size), entries, expected, dtype, moved)


# ------------------------------------------------------------------------------------------------ what is promised
FORWARD_SECONDS = dict(zip(map(str, SHAPES), (0.42e-3, 2.5e-3, 0.84e-3)))
BACKWARD_SECONDS = dict(zip(map(str, SHAPES), (1.25e-3, 5.0e-3, 2.5e-3)))
TARGETS = [
    *(Target("forward", size, "mamba_ssm", 2.5) for size in FORWARD_SECONDS),
    *(Target("backward", size, "mamba_ssm", 3) for size in BACKWARD_SECONDS),
    *(Target("forward", size, "rom cuda", s, at_most=True, what="median") for size, s in FORWARD_SECONDS.items()),
    *(Target("backward", size, "rom cuda", s, at_most=True, what="median") for size, s in BACKWARD_SECONDS.items()),
    *(Target(kind, str(s), "rom triton", 2, at_most=True) for s in SHAPES for kind in ("forward", "backward")),
    Target("decode, CUDA graph", str(DECODE[0]), "rom cuda", 10e-6, at_most=True, what="median"),
    Target("decode, CUDA graph", str(DECODE[1]), "rom cuda", 1 / 1.5, what="fraction"),
]


def cases(options: argparse.Namespace, dtypes: list[torch.dtype]) -> Iterator[Case]:
    """The cases one by one: each is built when the one before it is done, and its memory is free again."""
    for dtype in dtypes:
        for backward in (False, True):
            for shape in options.shape if (options.backward if backward else options.forward) else ():
                yield sequence(shape, dtype, backward, options.device)
        for size in DECODE if options.decode else ():
            for graph in (True, False):
                yield decode(size, dtype, options.device, graph)
