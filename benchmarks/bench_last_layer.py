"""All single-bit faults of a last layer: the closed form, against a softmax for every fault.

python benchmarks/bench_last_layer.py [--quick] [--shape IMAGES,CLASSES]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Benchmark, Case, Contender, Cost, Row, Tensors, arguments, parse

import rom
from rom.reference import last_layer as reference

BITS = 32
# Of a fault, at the least, in multiply-adds: 15 for the logarithm, 8 for e^d − 1, 12 to flip, compare and count.
SLOTS = 35


def by_softmax(logits: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Every faulty vector of logits, written out, in PyTorch."""
    golden = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    classes = logits.shape[1]
    loss = logits.new_zeros(classes, BITS, dtype=torch.float64)
    for bit in range(BITS):
        new = reference.flipped(logits, bit)
        for k in range(classes):
            faulty = logits.clone()
            faulty[:, k] = new[:, k]
            change = (torch.nn.functional.cross_entropy(faulty, labels, reduction="none") - golden).abs()
            loss[k, bit] = change[new[:, k].isfinite()].double().sum()
    return (loss,)


def case(device: str, threads: int, images: int, classes: int) -> Case:
    logits = 3 * torch.randn(images, classes, device=device)
    labels = torch.randint(0, classes, (images,), device=device)
    faults = images * classes * BITS

    def exactly(by_image: bool) -> Tensors:
        return reference.logit_flips(logits, labels, 1.0, -torch.inf, torch.inf, torch.nan, by_image)[:1]

    def by_rom(by_image: bool) -> Tensors:
        return rom.ops.logit_flips(logits, labels, by_image=by_image)[:1]

    contenders = [
        Contender("rom", lambda: lambda: by_rom(False)),
        Contender("rom by image", lambda: lambda: by_rom(True), reference=lambda: exactly(True)),
        Contender("softmax per fault", lambda: lambda: by_softmax(logits, labels)),
    ]
    return Case(
        f"{faults:,} faults",
        str((images, classes)),
        contenders if classes <= 100 else contenders[:2],  # 1000 classes: a thousand times the exponentials
        lambda: exactly(False),
        cost=Cost(faults * SLOTS, faults, images * classes * 4),
        clock="cpu" if threads == 1 else "wall",
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments(__doc__)
    parser.add_argument("--shape", metavar="IMAGES,CLASSES", action="append", help="repeatable")
    options = parse(parser, argv)
    benchmark = Benchmark("faults of a last layer", options)
    for text in options.shape or (["100,10"] if options.quick else ["2000,10", "2000,100", "500,1000"]):
        images, classes = (int(n) for n in text.split(","))
        benchmark.run(case(options.device, options.threads, images, classes))
    benchmark.finish()
    return benchmark.rows


if __name__ == "__main__":
    main()
