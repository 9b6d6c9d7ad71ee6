"""Every GPU kernel of ours once: small for the sanitizer, at the benchmark's size for the profiler.

    compute-sanitizer --tool racecheck python benchmarks/launches.py
    ncu --profile-from-start off python benchmarks/launches.py --large --family scan --backend cuda

Each launch runs under `cuda` and `triton` where they exist; the profiler is switched on around the operator alone.
Whether the results are right is the tests' business; that the calls end and give finite numbers is checked here.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from harness import Tensors
from scan_peers import Problem
from torch import Tensor

import rom

BACKENDS = ("cuda", "triton")
Call = Callable[[], Tensors]


@dataclass(frozen=True)
class Launch:
    """`make` returns what prepares nothing any more: the operator forward, or its backward pass."""

    family: str
    op: str
    name: str
    make: Callable[[], Call]


# ------------------------------------------------------------------------------------------------ forward, backward
def _backward(forward: Callable[..., Tensors], inputs: dict[str, Tensor]) -> Call:
    """The gradients of all floating inputs, from a forward pass that is over."""
    leaves = {n: x.detach().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    outputs = forward(**leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    grads = [torch.ones_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)


def _both_ways(
    family: str, op: str, name: str, forward: Callable[..., Tensors], inputs: Callable[[], dict[str, Tensor]]
) -> Iterator[Launch]:
    def make_forward() -> Call:
        given = inputs()

        def call() -> Tensors:
            with torch.no_grad():
                return forward(**given)

        return call

    yield Launch(family, op, f"{name} forward", make_forward)
    yield Launch(family, op, f"{name} backward", lambda: _backward(forward, inputs()))


# ------------------------------------------------------------------------------------------------ the families
def scan(large: bool, device: str) -> Iterator[Launch]:
    def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, groups: int = 1) -> dict[str, Tensor]:
        values = Problem.random(shape, dtype, device).arguments
        if groups > 1:
            values |= {n: torch.stack([values[n]] * groups, 2) for n in ("B", "C")}
        return values

    def plain(**given: Tensor) -> Tensors:
        return (rom.ops.selective_scan(**given, delta_softplus=True),)

    def with_states(**given: Tensor) -> Tensors:
        out = rom.ops.selective_scan(**given, delta_softplus=True, return_final_state=True)
        assert isinstance(out, tuple)
        return out

    def both_ways(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, groups: int = 1) -> Iterator[Launch]:
        yield from _both_ways("scan", "selective_scan", name, plain, lambda: inputs(shape, dtype, groups))  # type: ignore[arg-type]

    def packed() -> dict[str, Tensor]:
        starts = torch.tensor([0, 5, 5, 38, 70], dtype=torch.int32, device=device)
        return inputs((1, 70, 24, 16), torch.float32) | {
            "cu_seqlens": starts,
            "initial_state": torch.randn(4, 24, 16, device=device),
        }

    if large:
        yield from both_ways("(8, 2048, 4096, 16)", 8, 2048, 4096, 16)
        yield from both_ways("(1, 65536, 4096, 16)", 1, 65536, 4096, 16)
        return
    yield from both_ways("odd sizes", 2, 77, 37, 16)
    yield from both_ways("float32, two groups", 1, 40, 64, 16, dtype=torch.float32, groups=2)
    yield from _both_ways("scan", "selective_scan", "packed, with states", with_states, packed)
    for state in (8, 64):
        yield from both_ways(f"{state} states", 2, 33, 20, state, dtype=torch.float16)
    yield from both_ways("long and narrow", 1, 1500, 8, 16)


def decode(large: bool, device: str) -> Iterator[Launch]:
    def update(batch: int, dim: int, size: int) -> Call:
        arguments = Problem.random((batch, 1, dim, size), torch.bfloat16, device).arguments
        now = {n: v[:, 0] if v.dim() == 3 else v for n, v in arguments.items()}
        state = torch.randn(batch, dim, size, device=device)
        return lambda: (rom.ops.selective_state_update(state, **now, delta_softplus=True), state)

    def conv(batch: int, dim: int) -> Call:
        x = torch.randn(batch, dim, device=device, dtype=torch.bfloat16)
        state, weight, bias = (torch.randn(*s, device=device) for s in ((batch, dim, 4), (dim, 4), (dim,)))
        return lambda: (rom.ops.causal_conv1d_update(x, state, weight, bias, "silu"), state)

    for batch, dim in ((1, 8192), (128, 8192)) if large else ((1, 37), (3, 264)):
        size = f"({batch}, {dim})"
        yield Launch("decode", "selective_state_update", size, lambda b=batch, d=dim: update(b, d, 16))
        yield Launch("decode", "causal_conv1d_update", size, lambda b=batch, d=dim: conv(b, d))


def conv(large: bool, device: str) -> Iterator[Launch]:
    def inputs(batch: int, length: int, dim: int, width: int) -> dict[str, Tensor]:
        x = torch.randn(batch, length, dim, device=device, dtype=torch.bfloat16)
        return {"x": x, "weight": torch.randn(dim, width, device=device), "bias": torch.randn(dim, device=device)}

    def forward(**given: Tensor) -> Tensors:
        return (rom.ops.causal_conv1d(**given, activation="silu"),)

    for sizes in ((8, 2048, 4096, 4),) if large else ((2, 77, 37, 4), (1, 40, 64, 3), (1, 9, 8, 2)):
        yield from _both_ways("conv", "causal_conv1d", str(sizes), forward, lambda s=sizes: inputs(*s))


def norm(large: bool, device: str) -> Iterator[Launch]:
    def inputs(rows: int, dim: int) -> dict[str, Tensor]:
        x, residual = torch.randn(2, rows, dim, device=device, dtype=torch.bfloat16).unbind()
        return {"x": x, "weight": torch.randn(dim, device=device), "residual": residual}

    for sizes in ((16384, 2048),) if large else ((33, 37), (5, 1024)):
        yield from _both_ways("norm", "add_rms_norm", str(sizes), rom.ops.add_rms_norm, lambda s=sizes: inputs(*s))


def routing(large: bool, device: str) -> Iterator[Launch]:
    """Router and sort, then the projections before and after the sequence stage of a block."""

    def route(logits: Tensor) -> Tensors:
        return (rom.ops.route(logits, top_k).weights,)

    def project(x: Tensor, weight: Tensor, rows_in: str = "token", rows_out: str = "token") -> Tensors:
        routing = rom.ops.route(torch.randn(tokens, experts, device=device), top_k)
        return (rom.ops.routed_linear(x, weight, routing, None, rows_out == "token", rows_in, rows_out),)

    def inputs(rows: int, wide: int, narrow: int) -> dict[str, Tensor]:
        x, weight = torch.randn(rows, wide, device=device), torch.randn(experts, narrow, wide, device=device)
        return {"x": x.bfloat16(), "weight": weight.bfloat16()}

    for tokens, dim, experts, top_k in ((32768, 2048, 8, 1),) if large else ((33, 24, 5, 2), (200, 40, 8, 1)):
        slots = tokens * top_k
        before, after = partial(inputs, tokens, dim, 4 * dim), partial(inputs, slots, 2 * dim, dim)
        name, logits = f"({tokens}, {dim}, {experts}, {top_k})", torch.randn(tokens, experts, device=device)
        yield from _both_ways("routing", "route", name, route, partial(dict, logits=logits))
        yield from _both_ways("routing", "routed_linear", name, partial(project, rows_out="expert"), before)
        yield from _both_ways("routing", "routed_linear", name, partial(project, rows_in="expert"), after)


def orthogonal(large: bool, device: str) -> Iterator[Launch]:
    """Square in a warp and in a block, tall in one launch and cut into parts of rows."""

    def mapped(op: str, x: Tensor) -> Tensors:
        return (getattr(rom.ops, op)(x),)

    def inputs(batch: int, n: int, k: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, n, k, device=device) / n**0.5}

    big = ((4096, 16, 16), (4096, 32, 32), (4096, 64, 64), (256, 128, 128), (64, 512, 64), (1, 2048, 64))
    small = ((5, 7, 7), (3, 33, 20), (1, 200, 17), (2, 70, 40), (2, 100, 100))
    for sizes in big if large else small:
        for op in ("cayley", "householder"):
            yield from _both_ways("orthogonal", op, str(sizes), partial(mapped, op), lambda s=sizes: inputs(*s))


FAMILIES = {"scan": scan, "decode": decode, "conv": conv, "norm": norm, "routing": routing, "orthogonal": orthogonal}


# ------------------------------------------------------------------------------------------------ the run
def run(launch: Launch, backend: str, device: str, warm: bool) -> None:
    """Prepares, then launches with the profiler on; `warm` leaves compiling and tuning outside."""
    with rom.backend(backend):
        call = launch.make()
        if warm:
            call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        results = call()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
    if not all(torch.isfinite(x).all() for x in results):
        raise ArithmeticError("results are not finite")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="at the benchmark's size")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="repeatable; default: all")
    parser.add_argument(
        "--backend", choices=(*BACKENDS, "cpu"), action="append", help="repeatable; default cuda, triton"
    )
    options = parser.parse_args(argv)
    backends = options.backend or BACKENDS
    device = "cpu" if backends == ["cpu"] else "cuda"
    reasons = {(row.op, row.backend): row.reason for row in rom.backends()}
    failures = launched = 0
    for family, backend in itertools.product(options.family or FAMILIES, backends):
        for launch in FAMILIES[family](options.large, device):
            label = f"{backend} {launch.op} {launch.name}"
            if reason := reasons[launch.op, backend]:
                print(f"{label}: skipped, {reason}", flush=True)
                continue
            print(f"{label} …", flush=True)
            launched += 1
            try:
                run(launch, backend, device, options.large)
            except Exception:
                failures += 1
                traceback.print_exc()
    print(f"{launched} launches, {failures} failures", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
