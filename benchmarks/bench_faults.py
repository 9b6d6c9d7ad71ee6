"""Fault injection: the faulty product against the clean one, and whole campaigns against other injectors.

python benchmarks/bench_faults.py [--quick] [--part gemm|campaigns|restart]

gemm: what sites cost in a product. campaigns: time per injection, of the same models on the same data, against
PyTorchFI (when installed) and a page of hooks; ours also judges and logs every fault. restart: what beginning again at
the faulty layer and recomputing windows save, layers drawn uniformly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from faults_peers import MODELS, hooks, made, pytorchfi
from harness import Benchmark, Case, Contender, Row, Target, Tensors, arguments, parse

import rom
from rom import faults
from rom.campaign import OUTCOMES, Engine

TILE = 128
SAMPLES = 64
#: Of the dossier: batch sizes where the hooks of PyTorchFI cost most and least.
CAMPAIGNS = (("MLP", 32), ("ResNet-20", 1), ("ResNet-20", 32), ("ResNet-18", 32), ("transformer", 32))
BATCHES = {"MLP": 32, "ResNet-18": 2}  # of faults per layer, 4 otherwise: a call takes seconds, not minutes
TARGETS = [
    Target("campaign", "MLP, B = 32", "PyTorchFI", 3),
    Target("campaign", "ResNet-20, B = 1", "PyTorchFI", 3),
    *(Target("campaign", f"{name}, B = {batch}", "PyTorchFI", 0.95) for name, batch in CAMPAIGNS[2:]),
    Target("restart", "ResNet-18, B = 32", "full forwards", 2),
]


# ------------------------------------------------------------------------------------------------ products
def gemm_case(device: str, dtype: torch.dtype, size: int, sites: str) -> Case:
    """A square product with some sites in its result."""
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    rng = np.random.default_rng(0)
    places = {"none": 0, "1": 1, "one per tile": (size // TILE) ** 2 or 1, "1 %": size * size // 100}[sites]
    if sites == "one per tile":
        row, col = np.divmod(np.arange(places), max(size // TILE, 1))
        row, col = (tile * TILE + rng.integers(TILE, size=places) % size for tile in (row, col))
    else:
        row, col = np.divmod(rng.permutation(size * size)[:places], size)
    sign = faults.flip(1 << (8 * a.element_size() - 1))
    table = faults.records.to_tensor(faults.sites(faults.Target.OUTPUT, sign, sample=row, col=col), device)

    def reference() -> Tensors:
        y = a.double() @ b.double()
        y[torch.from_numpy(row).to(device), torch.from_numpy(col).to(device)] *= -1
        return (y,)

    def clean() -> Tensors:
        return ((a.double() @ b.double()),)

    contenders = [
        Contender("rom", lambda: lambda: (rom.ops.faulty_matmul(a, b, table)[0],)),
        Contender("torch, clean", lambda: lambda: (a @ b,), reference=clean),
    ]
    return Case("product", f"{size}³, sites: {sites}", contenders, reference, dtype, clock="cpu")


# ------------------------------------------------------------------------------------------------ campaigns
def outcomes(results: np.ndarray) -> Tensors:
    """What two ways to run the same faults must agree on."""
    return (torch.tensor(np.stack([results[name] for name in OUTCOMES]).astype(np.float64)),)


class Setting:
    """A model, data, and a plan with equally many faults in every layer."""

    def __init__(self, name: str, batch: int, device: str, per_layer: int) -> None:
        self.model, shape = made(name, device)
        self.x = torch.randn(SAMPLES, *shape, device=device)
        with torch.no_grad():
            self.labels = self.model(self.x).argmax(1).cpu()
        self.found, self.batch = faults.survey(self.model, self.x[:2]), batch
        modules = dict(self.model.named_modules())
        strata = self.found.strata(SAMPLES, layers=lambda layer: isinstance(modules.get(layer.name), LAYERS))
        self.plan = faults.FaultPlan.stratified(strata, [per_layer] * len(strata), seed=1)

    def run(self, **options: bool) -> Callable[[], Tensors]:
        """A call that runs the plan."""
        engine = Engine(self.found, self.plan, self.x, self.labels, batch_size=self.batch, **options)
        positions = np.arange(len(self.plan))
        return lambda: outcomes(engine.run(positions))

    def ours(self, name: str = "rom", **options: bool) -> Contender:
        """The engine, per injection."""
        return Contender(name, partial(self.run, **options), repeats=len(self.plan))


LAYERS = (torch.nn.Conv2d, torch.nn.Linear)


def finite(y: torch.Tensor) -> Tensors:
    """Logits without what flips of high bits make of some."""
    return (torch.where(y.isfinite() & (y.abs() < 1e4), y, 0.0).detach(),)


def per_injection(run: Callable[[], torch.Tensor]) -> Callable[[], Tensors]:
    """Without gradients, as everybody runs campaigns."""

    def call() -> Tensors:
        with torch.no_grad():
            return finite(run())

    return call


def campaign_case(name: str, batch: int, device: str, per_layer: int) -> Case:
    """Ours, two other injectors, and the forward pass without faults, each per injection."""
    setting = Setting(name, batch, device, per_layer)
    x, model = setting.x[:batch].clone(), setting.model
    masks = torch.tensor([1 << bit for bit in range(31)], dtype=torch.int32, device=device)
    by_hooks = partial(hooks, model, setting.plan, x, masks)
    peer = pytorchfi(model, x)
    contenders = [
        setting.ours(),
        Contender("PyTorchFI", peer and (lambda: per_injection(pytorchfi(model, x))), "pip install --no-deps pytorchfi",
                  reference=peer and per_injection(pytorchfi(model, x, check=True)), repeats=batch),
        Contender("hooks", lambda: per_injection(by_hooks()), reference=per_injection(by_hooks()), repeats=batch),
        Contender("forward, clean", lambda: per_injection(lambda: model(x)),
                  reference=per_injection(lambda: model(x)), repeats=batch),
    ]  # fmt: skip
    small = Setting(name, batch, device, per_layer)
    return Case("campaign", f"{name}, B = {batch}", contenders, small.run(restart=False), clock="cpu")


def restart_case(name: str, batch: int, device: str, per_layer: int) -> Case:
    """The engine with and without its shortcuts, per injection."""
    setting = Setting(name, batch, device, per_layer)
    contenders = [
        setting.ours(),
        setting.ours("without cone", cone=False),
        setting.ours("full forwards", restart=False),
    ]
    return Case("restart", f"{name}, B = {batch}", contenders, setting.run(restart=False), clock="cpu")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = arguments(__doc__)
    parser.add_argument("--part", action="append", choices=("gemm", "campaigns", "restart"), help="repeatable; all")
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="campaigns and restart of these only")
    options = parse(parser, argv)
    benchmark = Benchmark("Faults", options)
    parts = options.part or ["gemm", "campaigns", "restart"]
    wanted = options.model or (["MLP", "ResNet-20"] if options.quick else list(MODELS))
    gpu = options.device == "cuda"
    if "gemm" in parts:
        size = 256 if options.quick else 4096 if gpu else 1024
        for sites in ("none", "1", "one per tile", "1 %"):
            benchmark.run(gemm_case(options.device, torch.bfloat16 if gpu else torch.float32, size, sites))
    for name, batch in CAMPAIGNS if "campaigns" in parts else ():
        if name in wanted:
            per_layer = max(batch, 8) * (1 if options.quick else BATCHES.get(name, 4))
            benchmark.run(campaign_case(name, batch, options.device, per_layer))
    if "restart" in parts:
        for name, batch in (("ResNet-20", 32), ("ResNet-18", 32)):
            if name in wanted:
                per_layer = batch * (1 if options.quick else BATCHES.get(name, 4))
                benchmark.run(restart_case(name, batch, options.device, per_layer))
    benchmark.finish(TARGETS)
    return benchmark.rows


if __name__ == "__main__":
    main()
