"""Orthogonal maps against torch's three, torch.linalg.qr, geotorch, torch_householder and plain torch.

python benchmarks/bench_orthogonal.py [--quick] [--square] [--tall] [--shape BATCH,N,K] [--targets]

On a GPU also in batches that fill it, and against torch with TF32 as the user left it (off by default).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orthogonal_peers as peers
import torch
from harness import Benchmark, Case, Contender, Cost, Row, Target, Tensors, arguments, parse

import rom
from rom.reference import orthogonal as reference

SHAPES = ["1024,16,16", "256,32,32", "64,64,64", "1,512,512", "1,512,128", "1,2048,64", "16,256,64", "64,512,16"]
SHAPES += ["64,128,32"]
GPU_SHAPES = ["4096,16,16", "4096,32,32", "4096,64,64", "256,128,128", "256,256,256", "1,1024,1024"]
GPU_SHAPES += ["64,512,64", "4096,64,16"]
BOTH = "forward+backward"
# far from the origin, where an inverse needs pivoting, and in 16 bits: shape, factor of x, dtype
EXTRA = [(shape, 30, torch.float32) for shape in ("1024,16,16", "256,32,32", "64,64,64", "1,512,512")]
EXTRA += [(shape, 1, torch.bfloat16) for shape in ("1024,16,16", "64,64,64", "1,512,128")]
EXTRA += [("64,64,64", 1, torch.float16)]
TARGETS = [
    Target(f"cayley {BOTH}", "(1024, 16, 16)", "torch cayley", 10),
    Target(f"cayley {BOTH}", "(256, 32, 32)", "torch cayley", 3),
    Target(f"cayley {BOTH}", "(64, 64, 64)", "torch cayley", 3),
    Target(f"cayley {BOTH}", "(1, 512, 128)", "torch cayley", 12),
    Target(f"cayley {BOTH}", "(1, 2048, 64)", "torch cayley", 600),
    Target(f"householder {BOTH}", "(1, 512, 128)", "torch householder", 25),
    Target(f"householder {BOTH}", "(1, 2048, 64)", "torch householder", 400),
]
# Batches of n <= 64: 10 times torch. Within twice the floor where that is more than 20 us.
SMALL = ["(1024, 16, 16)", "(256, 32, 32)", "(64, 64, 64)", "(4096, 16, 16)", "(4096, 32, 32)", "(4096, 64, 64)"]
GPU_TARGETS = [
    *(Target(f"{name} {BOTH}", size, f"torch {name}", 10) for size in SMALL for name in ("cayley", "householder")),
    *(
        Target(f"{name} {kind}", size, "rom", 0.5, what="fraction")
        for size in ("(4096, 64, 64)", "(256, 256, 256)", "(1, 1024, 1024)")
        for kind in ("forward", BOTH)
        for name in ("cayley", "householder")
    ),
]


def timed(map: peers.Map, x: torch.Tensor, grad: torch.Tensor, backward: bool) -> Callable[[], Tensors]:
    if not backward:
        return lambda: (map(x),)
    leaf = x.detach().requires_grad_()

    def both() -> Tensors:
        q = map(leaf)
        return (q, *torch.autograd.grad(q, leaf, grad))

    return both


def case(
    name: str,
    device: str,
    threads: int,
    shape: tuple[int, int, int],
    backward: bool,
    scale: float = 1,
    dtype: torch.dtype = torch.float32,
) -> Case:
    batch, n, k = shape
    # a unit diagonal is what torch's and torch_householder's Householder read, and what no other map looks at
    x = (scale * torch.randn(shape, device=device) / n**0.5).tril(-1) + torch.eye(n, k, device=device)
    x, grad = x.to(dtype), torch.randn(shape, device=device).to(dtype)
    x64, grad64 = x.double(), grad.double()

    def contender(title: str, map: peers.Map | None, own: bool = False, seconds: float = 0) -> Contender:
        if map is None:
            return Contender(title, missing="not installed")
        return Contender(
            title,
            lambda: timed(map, x, grad, backward),
            reference=timed(map, x64, grad64, backward) if own else None,  # another map: its own float64
            predict=lambda: seconds,
        )

    # what CPUs take; a GPU is at least fifty times as fast, or waits for launches
    square = batch * n**3 * (0.02 if device == "cuda" else 1)
    reflections = batch * k * n * n * (0.02 if device == "cuda" else 1)
    exp = contender("torch matrix_exp", peers.by_torch("matrix_exp"), own=True, seconds=3e-9 * square)
    qr = contender("torch.linalg.qr", peers.in_float32(peers.by_qr), own=True)
    contenders = [contender("rom", getattr(rom.ops, name))]
    if name == "cayley":
        torchs = contender("torch cayley", peers.by_torch("cayley"), seconds=1.5e-10 * square)
        plain = contender("plain torch", peers.in_float32(peers.CayleyFormula.apply))
        contenders += [torchs, plain, qr, exp, contender("geotorch cayley", peers.by_geotorch(), own=True)]
        operations = batch * (3 * (n - k) * k * k + 2 * k**3) + backward * batch * (6 * (n - k) * k * k + 4 * k**3)
    else:
        torchs = contender("torch householder", peers.by_torch("householder"), seconds=reflections * 1e-8)
        plain = contender("plain torch", peers.in_float32(peers.HouseholderFormula.apply))
        contenders += [torchs, plain, qr, contender("torch_householder", peers.by_torch_householder())]
        operations = batch * (3 * n * k * k + k**3) + backward * batch * (6 * n * k * k + 2 * k**3)
    return Case(
        f"{name} {BOTH}" if backward else f"{name} forward",
        f"{shape}{'' if scale == 1 else f' times {scale}'}",
        contenders,
        timed(getattr(reference, name), x64, grad64, backward),
        cost=Cost(operations / 2, 0, batch * dtype.itemsize * n * k * (5 if backward else 2)),
        dtype=dtype,
        clock="cuda" if device == "cuda" else "cpu" if threads == 1 else "wall",
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments(__doc__)
    parser.add_argument(
        "--shape", metavar="BATCH,N,K", action="append", help="repeatable; default the nine of the table, more on a GPU"
    )
    parser.add_argument("--square", action="store_true", help="of the default shapes only the square ones")
    parser.add_argument("--tall", action="store_true", help="of the default shapes only the tall ones")
    options = parse(parser, argv)
    benchmark = Benchmark("orthogonal maps", options)
    on_gpu = options.device == "cuda"

    def run(name: str, text: str, *how: Any) -> None:
        batch, n, k = (int(part) for part in text.split(","))
        if options.shape or options.square in (options.tall, n == k):
            benchmark.run(case(name, options.device, options.threads, (batch, n, k), *how))

    for text in options.shape or (["8,16,16", "2,64,32"] if options.quick else SHAPES + GPU_SHAPES * on_gpu):
        for name in ("cayley", "householder"):
            run(name, text, False)
            run(name, text, True)
    for text, scale, dtype in [] if options.shape else [("8,16,16", 30, torch.bfloat16)] if options.quick else EXTRA:
        run("cayley", text, True, scale, dtype)
        if dtype != torch.float32:
            run("householder", text, True, scale, dtype)
    benchmark.finish(GPU_TARGETS if on_gpu else TARGETS)
    return benchmark.rows


if __name__ == "__main__":
    main()
