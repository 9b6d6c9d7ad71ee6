"""causal_conv1d against torch and causal-conv1d: forward, backward, and the decode step. Bytes are all there is to it.

    python benchmarks/bench_conv.py [--quick] [--shape B,L,D] [--forward] [--backward] [--update]

Everybody gets the layout it likes best: ours and the formula (batch, length, dim), torch's conv1d (batch, dim, length),
causal-conv1d both. Width 4, bias and SiLU, as in Mamba.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from harness import Benchmark, Case, Contender, Cost, Row, Target, Tensors, arguments, parse
from torch import Tensor
from torch.nn import functional as F

import rom

Shape = tuple[int, int, int]
Conv = Callable[[Tensor, Tensor, Tensor], Tensor]
WIDTH = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(1, 2048, 1536)],
    "cuda": [(8, 2048, 4096), (1, 65536, 4096), (16, 4096, 2048)],
}
QUICK_SHAPES: list[Shape] = [(1, 128, 256)]


# ------------------------------------------------------------------------------------------------ the convolutions
def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rom.ops.causal_conv1d(x, weight, bias, "silu")


def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The sum of shifted copies: the leanest channel-last torch."""
    padded, length = F.pad(x, (0, 0, WIDTH - 1, 0)), x.shape[1]
    pre = bias + padded[:, :length] * weight[:, 0]
    for k in range(1, WIDTH):
        pre = torch.addcmul(pre, padded[:, k : k + length], weight[:, k])
    return F.silu(pre)


def torch_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Channel-first; as the fallback of every Mamba port does it."""
    out = F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=x.shape[1])
    return F.silu(out[..., : x.shape[2]])


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(batch, dim, length) with unit stride along either."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x, weight, bias, activation="silu")


@dataclass(frozen=True)
class Peer:
    """A convolution, how it likes its input, and whether its parameters have the input's dtype."""

    conv: Conv
    layout: Callable[[Tensor], Tensor] = lambda x: x
    back: Callable[[Tensor], Tensor] = lambda x: x
    narrow: bool = False


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _swap_copy(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


PACKAGE = "causal-conv1d"


def peers() -> dict[str, Peer]:
    """Ours first."""
    return {
        "rom": Peer(ours),
        "torch formula": Peer(formula, narrow=True),
        "compiled formula": Peer(torch.compile(formula, dynamic=False), narrow=True),
        "torch conv1d": Peer(torch_conv1d, _swap_copy, _swap, narrow=True),
        PACKAGE: Peer(causal_conv1d, _swap_copy, _swap),
        f"{PACKAGE}, channel-last": Peer(causal_conv1d, _swap, _swap),
    }


def missing(name: str) -> str:
    """Why a contender cannot run here; empty if it can."""
    if not name.startswith(PACKAGE):
        return ""
    if importlib.util.find_spec("causal_conv1d") is None:
        return "causal_conv1d is not installed; `pip install causal-conv1d --no-build-isolation`"
    return "" if torch.cuda.is_available() else "causal_conv1d has no CPU kernel"


# ------------------------------------------------------------------------------------------------ forward, backward
def timed(peer: Peer, x: Tensor, parameters: Tensors, grad: Tensor, backward: bool) -> Callable[[], Tensors]:
    """The output alone, or the gradients alone, of a graph that is kept."""
    x = peer.layout(x)
    weight, bias = (p.to(x.dtype) if peer.narrow else p for p in parameters)
    if not backward:
        return torch.no_grad()(lambda: (peer.conv(x, weight, bias),))
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out, grad = peer.conv(*leaves), peer.layout(grad)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def case(options: argparse.Namespace, shape: Shape, dtype: torch.dtype, backward: bool) -> Case:
    """x and out once through memory, or x and two gradients."""
    batch, length, dim = shape
    device = options.device
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    parameters = torch.randn(dim, WIDTH, device=device), torch.randn(dim, device=device)

    def contender(name: str, peer: Peer) -> Contender:
        if reason := missing(name):
            return Contender(name, missing=reason)
        return Contender(
            name,
            lambda: timed(peer, x, parameters, grad, backward),
            canonical=lambda results: (peer.back(results[0]), *results[1:]),
        )

    def reference() -> Tensors:
        return timed(Peer(formula), x.double(), tuple(p.double() for p in parameters), grad.double(), backward)()

    elements = batch * length * dim
    return Case(
        "backward" if backward else "forward",
        str(shape),
        [contender(name, peer) for name, peer in peers().items()],
        reference,
        dtype,
        Cost(elements * WIDTH * (3 if backward else 1), elements, elements * dtype.itemsize * (3 if backward else 2)),
        clock="cpu" if options.threads == 1 else "wall",
    )


# ------------------------------------------------------------------------------------------------ decode
def _formula_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    state.copy_(torch.cat([state[:, :, 1:], x[..., None]], -1))
    return F.silu((state * weight).sum(-1) + bias)


def _package_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_update

    return causal_conv1d_update(x, state, weight, bias, "silu")


def _our_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return rom.ops.causal_conv1d_update(x, state, weight, bias, "silu")


def update(options: argparse.Namespace, batch: int, dim: int, dtype: torch.dtype) -> Case:
    """One token: the state in x's dtype, as causal-conv1d wants it, is read and written."""
    x = torch.randn(batch, dim, device=options.device).to(dtype)
    start = torch.randn(batch, dim, WIDTH, device=options.device).to(dtype)
    parameters = torch.randn(dim, WIDTH, device=options.device), torch.randn(dim, device=options.device)

    def contender(name: str, step: Callable[..., Tensor]) -> Contender:
        def make() -> Callable[[], Tensors]:
            state = start.clone()
            return torch.no_grad()(lambda: (step(x, state, *parameters),))

        reason = missing(name)
        return Contender(name, missing=reason) if reason else Contender(name, make)

    def reference() -> Tensors:
        return (_formula_step(x.double(), start.double(), *(p.double() for p in parameters)),)

    elements = batch * dim
    steps = {"rom": _our_step, "torch formula": _formula_step, PACKAGE: _package_step}
    return Case(
        "update",
        str((batch, dim)),
        [contender(name, step) for name, step in steps.items()],
        reference,
        dtype,
        Cost(elements * WIDTH, elements, elements * dtype.itemsize * (2 + 2 * WIDTH)),
        clock="cpu" if options.threads == 1 else "wall",
    )


# ------------------------------------------------------------------------------------------------ the run
def targets() -> Iterator[Target]:
    """What is promised on an NVIDIA H200: not slower than causal-conv1d, 85 % of what a copy reaches."""
    for size in map(str, SHAPES["cuda"]):
        for kind in ("forward", "backward"):
            yield Target(kind, size, "rom", 0.85, what="fraction")
            yield Target(kind, size, PACKAGE, 1.0)
            yield Target(kind, size, f"{PACKAGE}, channel-last", 1.0)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One by one: each is built when the one before it is done, and its memory is free again."""
    for dtype in (DTYPES[name] for name in options.dtype):
        for shape in options.shape:
            for backward in (False, True):
                if options.backward if backward else options.forward:
                    yield case(options, shape, dtype, backward)
        if options.update:
            for batch in (1, 128):
                yield update(options, batch, options.shape[0][2], dtype)


def _shape(text: str) -> Shape:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected three positive sizes B,L,D like 8,2048,4096, got {text!r}")
    return sizes  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments(__doc__)
    parser.add_argument("--shape", type=_shape, action="append", metavar="B,L,D", help="repeatable")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: bfloat16 on a GPU, else float32")
    for kind in ("forward", "backward", "update"):
        parser.add_argument(f"--{kind}", action="store_true", help=f"only {kind} (default: all three)")
    options = parse(parser, argv)
    options.shape = options.shape or (QUICK_SHAPES if options.quick else SHAPES[options.device])
    options.dtype = options.dtype or ["bfloat16" if options.device == "cuda" else "float32"]
    if not (options.forward or options.backward or options.update):
        options.forward = options.backward = options.update = True
    benchmark = Benchmark("causal convolution", options)
    for each in cases(options):
        benchmark.run(each)
    benchmark.finish(list(targets()) if options.device == "cuda" else ())
    return benchmark.rows


if __name__ == "__main__":
    main()
