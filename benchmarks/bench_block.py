"""The Routing Mamba block against our dense Mamba block of equal active parameters, and against a plain torch mixer.

    python benchmarks/bench_block.py                         (batch, length) = (8, 512), d 768, 8 experts, top 1
    python benchmarks/bench_block.py --quick
    python benchmarks/bench_block.py --shape 1,4096,1024 --experts 16 --top-k 2

The ratios are over the routed block: 0.8 for `dense block` says that routing costs a quarter more. Everybody's output
is compared with the reference backend in float64 on the first steps of the first sequence (the block is causal); the
gradients are the tests' business.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from harness import Benchmark, Case, Contender, Cost, Row, Target, Tensors, arguments, parse
from scan_peers import unbind_loop
from torch import Tensor
from torch.nn import functional as F

import rom

DEFAULT, QUICK = (8, 512, 768), (2, 64, 128)
CHECKED = 64  # steps


def plain_mixer(block: rom.RoutingMambaBlock, hidden: Tensor) -> Tensor:
    """A Mamba block of torch operators and a loop over time, with the parameters of our dense block."""
    x, z = F.linear(hidden, block.in_proj.weight).chunk(2, -1)
    conv = F.conv1d(
        x.transpose(1, 2), block.conv1d.weight, block.conv1d.bias, padding=block.d_conv - 1, groups=block.d_inner
    )
    u = F.silu(conv[..., : x.shape[1]].transpose(1, 2))
    dt, B, C = F.linear(u, block.x_proj.weight).split([block.dt_rank, block.d_state, block.d_state], -1)
    delta = F.linear(dt, block.dt_proj.weight)
    y = unbind_loop(u, delta, -torch.exp(block.A_log), B, C, block.D, z, block.dt_proj.bias)
    return F.linear(y, block.out_proj.weight)


def timed(
    function: Callable[[Tensor], Tensor], block: torch.nn.Module, hidden: Tensor, grad: Tensor | None
) -> Callable[[], Tensors]:
    """The output; with `grad` also the gradients of the input and of all parameters."""
    if grad is None:

        def forward() -> Tensors:
            with torch.no_grad():
                return (function(hidden),)

        return forward
    leaf, parameters = hidden.detach().requires_grad_(), list(block.parameters())

    def both() -> Tensors:
        out = function(leaf)
        return (out, *torch.autograd.grad(out, [leaf, *parameters], grad))

    return both


def in_double(block: rom.RoutingMambaBlock, hidden: Tensor) -> Tensors:
    """The block's output by the reference backend in float64."""
    with torch.no_grad(), rom.backend("reference"):
        return (copy.deepcopy(block).double()(hidden.double()),)


class Blocks:
    """The routed block and the dense one, and one input for both."""

    def __init__(self, shape: tuple[int, int, int], experts: int, top_k: int, device: str) -> None:
        torch.manual_seed(0)
        batch, length, width = shape
        self.routed = rom.RoutingMambaBlock(width, num_experts=experts, top_k=top_k, device=device)
        self.dense = rom.RoutingMambaBlock(width, num_experts=1, device=device)
        for block in (self.routed, self.dense):  # off the integers of the initialisation: no power trick is timed
            with torch.no_grad():
                block.A_log += 0.2 * torch.randn_like(block.A_log)
        self.hidden = torch.randn(batch, length, width, device=device)
        self.grad = torch.randn_like(self.hidden)

    def cost(self, backward: bool) -> Cost:
        """The multiply-adds of projections and scan (as in bench_scan.py); weights and activations through memory."""
        block, tokens = self.dense, self.hidden.shape[0] * self.hidden.shape[1]
        active = sum(p.numel() for n, p in block.named_parameters() if "proj" in n)
        scan = block.d_inner * block.d_state * (27 if backward else 10)
        arrays = tokens * (12 * block.d_inner + 2 * block.d_model)
        return Cost(
            tokens * (active * (3 if backward else 1) + scan), 0, 4 * (active + arrays) * (3 if backward else 1)
        )

    def sequence(self, backward: bool, threads: int) -> Case:
        grad = self.grad if backward else None
        routed, dense, hidden = self.routed, self.dense, self.hidden

        def mixer(x: Tensor) -> Tensor:
            return plain_mixer(dense, x)

        entries = [
            Contender("routed block", lambda: timed(routed, routed, hidden, grad), canonical=_beginning),
            Contender("dense block", lambda: timed(dense, dense, hidden, grad), canonical=_beginning),
            Contender("torch mixer", lambda: timed(mixer, dense, hidden, grad), canonical=_beginning),
        ]
        expected_dense = in_double(dense, hidden[:1, :CHECKED])
        entries[1].reference = entries[2].reference = lambda: expected_dense
        return Case(
            "forward+backward" if backward else "forward",
            f"{tuple(hidden.shape)} E={routed.num_experts} K={routed.top_k}",
            entries,
            lambda: in_double(routed, hidden[:1, :CHECKED]),
            cost=self.cost(backward),
            clock="cpu" if threads == 1 else "wall",
        )

    def decode(self, batch: int, threads: int) -> Case:
        hidden = self.hidden.flatten(0, 1)[:batch].unsqueeze(1)

        def step(block: rom.RoutingMambaBlock) -> Callable[[], Callable[[], Tensors]]:
            def make() -> Callable[[], Tensors]:
                states = block.allocate_inference_cache(len(hidden))

                def call() -> Tensors:
                    with torch.no_grad():
                        return (block.step(hidden, *states)[0],)

                return call

            return make

        dense = Contender("dense block", step(self.dense), reference=lambda: in_double(self.dense, hidden))
        size = f"batch {batch} E={self.routed.num_experts} K={self.routed.top_k}"
        entries = [Contender("routed block", step(self.routed)), dense]
        clock = "cpu" if threads == 1 else "wall"
        return Case("decode", size, entries, lambda: in_double(self.routed, hidden), clock=clock)


def _beginning(results: Tensors) -> Tensors:
    return (results[0][:1, :CHECKED],)


SIZE = "(8, 512, 768) E=8 K=1"
TARGETS = [
    Target("forward+backward", SIZE, "dense block", 1 / 1.3),
    Target("forward+backward", SIZE, "torch mixer", 10),
]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments(__doc__)
    parser.add_argument("--shape", metavar="B,L,D", help="batch, length, model width; default 8,512,768")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=1)
    options = parse(parser, argv)
    shape = tuple(int(n) for n in options.shape.split(",")) if options.shape else QUICK if options.quick else DEFAULT
    benchmark = Benchmark("Routing Mamba block", options)
    blocks = Blocks(shape, options.experts, options.top_k, options.device)
    for backward in (False, True):
        benchmark.run(blocks.sequence(backward, options.threads))
    for batch in (1, 8):
        benchmark.run(blocks.decode(batch, options.threads))
    benchmark.finish(TARGETS)
    return benchmark.rows


if __name__ == "__main__":
    main()
