"""The selective scan against everybody on this machine: forward, forward + backward, decode.

    python benchmarks/bench_scan.py                          about two minutes on two cores
    python benchmarks/bench_scan.py --quick                  under half a minute
    python benchmarks/bench_scan.py --shape 1,4096,2048,16 --forward --dtype bfloat16 --plot scan.png

One thread of a CPU is timed in CPU time, which other programs do not disturb; threads and GPUs by the wall clock. A GPU
has sizes, peers and promises of its own (scan_gpu.py), bfloat16, forward and backward apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import scan_gpu
import torch
from harness import Benchmark, Case, Contender, Cost, Row, Target, Tensors, arguments, parse
from scan_peers import ROSTER, Problem, contender, ours, reference, timed
from torch.nn.functional import silu, softplus

import rom

Shape = tuple[int, int, int, int]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHAPES: list[Shape] = [(1, 512, 1536, 16), (1, 2048, 1536, 16)]
QUICK_SHAPES: list[Shape] = [(1, 128, 256, 16)]
KINDS = {False: "forward", True: "forward+backward"}
# An exp is a polynomial of degree 5 and its reduction: 6 multiply-adds. Forward 4 more (δA, δBu, h, y); backward the
# exp again and 11 (state again, its gradient, and those of A, δ, B, C).
EXP_SLOTS, FORWARD_SLOTS, BACKWARD_SLOTS = 6, 4, 11


def cost(shape: Shape, dtype: torch.dtype, backward: bool) -> Cost:
    """Multiply-adds and exps per (b, l, d, n); u, delta, z and out (and their gradients) once through memory."""
    batch, length, dim, state = shape
    rows, passes = batch * length * dim, 2 if backward else 1
    exps = rows * (passes * state + 2 * passes)  # softplus and SiLU
    slots = FORWARD_SLOTS + (BACKWARD_SLOTS if backward else 0)
    arrays = rows * (11 if backward else 4) + batch * length * state * (6 if backward else 2)
    return Cost(rows * state * slots + exps * EXP_SLOTS, exps, arrays * dtype.itemsize)


def versus_peers(options: argparse.Namespace, shape: Shape, dtype: torch.dtype, backward: bool) -> Case:
    problem = Problem.random(shape, dtype, options.device)
    return Case(
        KINDS[backward],
        str(shape),
        [contender(name, problem, backward) for name in ROSTER],
        lambda: reference(problem, backward),
        dtype,
        cost(shape, dtype, backward),
        clock="cpu" if options.threads == 1 else "wall",
    )


def across_dtypes(options: argparse.Namespace, shape: Shape, backward: bool) -> Case:
    """The same numbers as float32 and as 16-bit storage; all are judged by the bounds of the coarsest."""
    rounded = Problem.random(shape, torch.bfloat16, options.device)

    def entry(dtype: torch.dtype) -> Contender:
        values = {n: v.to(dtype) if v.dim() == 3 else v for n, v in rounded.arguments.items()}
        problem = Problem(values, rounded.grad.to(dtype))
        return Contender(f"rom {str(dtype).removeprefix('torch.')}", lambda: timed(ours, problem, backward))

    entries = [entry(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    kind, clock = f"{KINDS[backward]}, I/O dtype", "cpu" if options.threads == 1 else "wall"
    return Case(kind, str(shape), entries, lambda: reference(rounded, backward), torch.bfloat16, clock=clock)


def across_threads(options: argparse.Namespace, shape: Shape, backward: bool) -> Case:
    """Two threads against one, by the wall clock: believe it on a quiet machine only."""
    problem = Problem.random(shape, torch.float32, options.device)
    entries = [
        Contender(f"rom, {n} thread{'s' * (n > 1)}", lambda: timed(ours, problem, backward), threads=n) for n in (2, 1)
    ]
    return Case(f"{KINDS[backward]}, threads", str(shape), entries, lambda: reference(problem, backward))


# ------------------------------------------------------------------------------------------------ decode
def _step(problem: Problem, state: torch.Tensor) -> torch.Tensor:
    """One token in plain torch, in place like the operator."""
    u, delta, A, B, C, D, z, bias = problem.arguments.values()
    u, delta, B, C, z = (x[:, 0] for x in (u, delta, B, C, z))
    delta = softplus(delta + bias)[..., None]
    state.mul_(torch.exp(delta * A)).add_(delta * u[..., None] * B[:, None])
    return ((state @ C[..., None])[..., 0] + D * u) * silu(z)


def decode(options: argparse.Namespace, shape: Shape, dtype: torch.dtype) -> Case:
    """One token for every sequence: 2 × state float32 values through memory per channel, and four activations."""
    batch, _, dim, size = shape
    problem = Problem.random((batch, 1, dim, size), dtype, options.device)
    start = torch.randn(batch, dim, size, device=options.device)

    def by_rom() -> Tensors:
        now = {n: v[:, 0] if v.dim() == 3 else v for n, v in problem.arguments.items()}
        state = start.clone()
        return lambda: (rom.ops.selective_state_update(state, **now, delta_softplus=True),)

    def by_torch(step) -> Tensors:  # type: ignore[no-untyped-def]
        state = start.clone()
        return lambda: (step(problem, state),)

    def expected() -> Tensors:
        return (_step(problem.double(), start.double()),)

    entries = [
        Contender("rom", by_rom),
        Contender("torch step", lambda: by_torch(_step)),
        Contender("compiled step", lambda: by_torch(torch.compile(_step, dynamic=False))),
    ]
    elements = batch * dim * size
    floor = Cost(elements * (EXP_SLOTS + FORWARD_SLOTS), elements, batch * dim * (8 * size + 4 * dtype.itemsize))
    clock = "cpu" if options.threads == 1 else "wall"
    return Case("decode", str((batch, dim, size)), entries, expected, dtype, floor, clock)


# ------------------------------------------------------------------------------------------------ the run
TARGETS = [
    Target("forward", str(SHAPES[1]), "Hugging Face", 75),
    Target("forward", str(SHAPES[1]), "mambapy", 75),
    Target("forward", str(SHAPES[1]), "compiled step", 7),
    Target("forward+backward", str(SHAPES[0]), "mambapy", 70),
    Target("forward+backward", str(SHAPES[1]), "mambapy", 70),
    Target("forward+backward", str(SHAPES[0]), "torch loop", 45),
    Target("forward+backward", str(SHAPES[0]), "discretised loop", 45),
    Target("forward", str(SHAPES[1]), "rom", 2e-6, at_most=True, what="error"),
    Target("forward+backward", str(SHAPES[1]), "rom", 2e-6, at_most=True, what="error"),
    Target("forward, I/O dtype", str(SHAPES[1]), "rom bfloat16", 1.2, at_most=True),
    Target("forward+backward, I/O dtype", str(SHAPES[1]), "rom bfloat16", 1.2, at_most=True),
    Target("forward, threads", str(SHAPES[1]), "rom, 1 thread", 1.8),
    Target("forward+backward, threads", str(SHAPES[1]), "rom, 1 thread", 1.8),
]


def cases(options: argparse.Namespace):  # type: ignore[no-untyped-def]
    """The cases one by one: each is built when the one before it is done, and its memory is free again."""
    passes = [backward for backward in (False, True) if getattr(options, "backward" if backward else "forward")]
    for dtype in (DTYPES[name] for name in options.dtype):
        for shape in options.shape:
            for backward in passes:
                yield versus_peers(options, shape, dtype, backward)
    largest = max(options.shape, key=lambda shape: shape[0] * shape[1] * shape[2] * shape[3])
    for backward in passes:
        yield across_dtypes(options, largest, backward)
        yield across_threads(options, largest, backward)
    if options.decode:
        batches = sorted({largest[0], 8 * largest[0]})
        for batch in batches:
            yield decode(options, (batch, *largest[1:]), DTYPES[options.dtype[0]])


def shape(text: str) -> Shape:
    """B,L,D,N."""
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected four positive sizes B,L,D,N like 1,2048,1536,16, got {text!r}")
    return sizes  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments(__doc__)
    parser.add_argument("--shape", "--shapes", type=shape, action="append", metavar="B,L,D,N", help="repeatable")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="repeatable; default float32, bfloat16 on a GPU"
    )
    for kind in ("forward", "backward", "decode"):
        parser.add_argument(f"--{kind}", action="store_true", help=f"only {kind} (default: all three)")
    options = parse(parser, argv)
    gpu = options.device == "cuda"
    shapes, quick = (scan_gpu.SHAPES, scan_gpu.QUICK_SHAPES) if gpu else (SHAPES, QUICK_SHAPES)
    options.shape = options.shape or (quick if options.quick else shapes)
    options.dtype = options.dtype or ["bfloat16" if gpu else "float32"]
    if not (options.forward or options.backward or options.decode):
        options.forward = options.backward = options.decode = True
    benchmark = Benchmark("selective scan", options)
    found = scan_gpu.cases(options, [DTYPES[name] for name in options.dtype]) if gpu else cases(options)
    for case in found:
        benchmark.run(case)
    benchmark.finish(scan_gpu.TARGETS if gpu else TARGETS)
    return benchmark.rows


if __name__ == "__main__":
    main()
