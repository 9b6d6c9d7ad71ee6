"""add + RMSNorm against plain torch and torch.nn.functional.rms_norm: bytes are all there is to it.

python benchmarks/bench_norm.py [--quick] [--shape ROWS,DIM]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from harness import Benchmark, Case, Contender, Cost, Row, Tensors, arguments, parse
from torch import Tensor

import rom

Norm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
EPS = 1e-5


def by_rom(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return rom.ops.add_rms_norm(x, weight, residual, EPS)


def by_torch(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.nn.functional.rms_norm(total, (x.shape[-1],), weight, EPS), total


def by_formula(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight, total


def timed(norm: Norm, inputs: Tensors, grads: Tensors, backward: bool) -> Callable[[], Tensors]:
    if not backward:
        return lambda: norm(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]

    def both() -> Tensors:
        outputs = norm(*leaves)
        return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    return both


def case(device: str, threads: int, rows: int, dim: int, backward: bool) -> Case:
    inputs = (
        torch.randn(rows, dim, device=device),
        torch.randn(dim, device=device),
        torch.randn(rows, dim, device=device),
    )
    grads = torch.randn(2, rows, dim, device=device).unbind()
    in64 = tuple(x.double() for x in inputs), tuple(g.double() for g in grads)
    compiled = torch.compile(by_formula)
    contenders = [("rom", by_rom), ("torch rms_norm", by_torch), ("torch formula", by_formula), ("compiled", compiled)]
    elements = rows * dim
    return Case(
        "forward+backward" if backward else "forward",
        str((rows, dim)),
        [Contender(name, lambda norm=norm: timed(norm, inputs, grads, backward)) for name, norm in contenders],
        timed(by_formula, *in64, backward),
        cost=Cost(elements * (12 if backward else 4), 0, elements * 4 * (8 if backward else 4)),
        clock="cpu" if threads == 1 else "wall",
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments(__doc__)
    parser.add_argument("--shape", metavar="ROWS,DIM", action="append", help="repeatable; default 4096,768")
    options = parse(parser, argv)
    benchmark = Benchmark("add + RMSNorm", options)
    for text in options.shape or ["256,256" if options.quick else "4096,768"]:
        for backward in (False, True):
            benchmark.run(case(options.device, options.threads, *(int(n) for n in text.split(",")), backward))
    benchmark.finish()
    return benchmark.rows


if __name__ == "__main__":
    main()
