"""The models that fault injectors are compared on, and two other injectors: PyTorchFI, and a page of hooks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from rom import faults

Injector = Callable[[], Tensor]  # a batch with a fault in every row; its logits


# ------------------------------------------------------------------------------------------------ models
def mlp() -> nn.Module:
    """784-512-512-512-10, as the dossier of this family measured it."""
    sizes = (784, 512, 512, 512, 10)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]  # noqa: RUF007
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


class Block(nn.Module):
    """Two convolutions and a skip connection (He et al. 2016)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = width == out and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False),
                                                             nn.BatchNorm2d(out))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.skip(x))


def resnet(widths: tuple[int, ...], blocks: int) -> nn.Module:
    """For 32 × 32 images: a stem of stride 1, a stage per width."""
    stages, width = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()], widths[0]
    for stage, out in enumerate(widths):
        for block in range(blocks):
            stages.append(Block(width, out, 2 if stage and not block else 1))
            width = out
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class EncoderLayer(nn.Module):
    """A pre-norm layer of separate linear modules: injectors by hook see all of them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Four layers of width 128 over 64 patches."""

    def __init__(self, dim: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(48, dim)
        self.layers = nn.Sequential(*(EncoderLayer(dim, 4) for _ in range(layers)))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (784,)),
    "ResNet-20": (lambda: resnet((16, 32, 64), 3), (3, 32, 32)),
    "ResNet-18": (lambda: resnet((64, 128, 256, 512), 2), (3, 32, 32)),
    "transformer": (Transformer, (64, 48)),
}


def made(name: str, device: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model with the statistics of a trained one: its batch norms have seen data."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(device)
    with torch.no_grad():
        model.train()(torch.randn(64, *shape, device=device))
    return model.eval(), shape


# ------------------------------------------------------------------------------------------------ other injectors
def hooks(model: nn.Module, plan: faults.FaultPlan, x: Tensor, masks: Tensor, seed: int = 0) -> Injector:
    """What one writes in an hour: a hook per layer of the plan that flips bits of gathered elements, a row each.

    As fast as hooks get, and no more: values of any dtype but one, restart and outcomes are not in it.
    """
    modules = dict(model.named_modules())
    layers = list(dict.fromkeys(stratum.layer for stratum in plan.strata))
    rng, chosen = np.random.default_rng(seed), {}

    def hook(name: str) -> Callable:
        def flip(module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
            rows, places, bits = chosen.get(name, (None, None, None))
            if rows is None:
                return None
            y = y.clone()
            words = y.view(torch.int32).flatten(1)
            index = (places * words.shape[1]).long()
            words[rows, index] ^= bits
            return y

        return flip

    def run() -> Tensor:
        chosen.clear()
        owner, n = rng.integers(0, len(layers), len(x)), len(x)
        places, bits = torch.from_numpy(rng.random(n)), masks[torch.from_numpy(rng.integers(0, len(masks), n))]
        for i in np.unique(owner):
            rows = torch.from_numpy(np.flatnonzero(owner == i))
            chosen[layers[i]] = tuple(t.to(x.device) for t in (rows, places[rows], bits[rows]))
        handles = [modules[name].register_forward_hook(hook(name)) for name in layers]
        try:
            return model(x)
        finally:
            for handle in handles:
                handle.remove()

    return run


def pytorchfi(model: nn.Module, x: Tensor, seed: int = 0, check: bool = False) -> Injector | None:
    """PyTorchFI 0.6: a random value at a random place of a random layer in every row; None where it is not installed.

    check: the same faults by hooks of ours, to compare with.
    """
    if importlib.util.find_spec("pytorchfi") is None:
        return None
    from pytorchfi.core import fault_injection

    kinds, rng = [nn.Conv2d, nn.Linear], np.random.default_rng(seed)
    injector = fault_injection(model, len(x), input_shape=list(x.shape[1:]), layer_types=kinds, use_cuda=x.is_cuda)
    shapes = [tuple(shape[1:]) for shape in injector.output_size]
    modules = [module for module in model.modules() if isinstance(module, tuple(kinds))]

    def draw() -> tuple[list, ...]:
        layers = rng.integers(0, len(shapes), len(x)).tolist()
        places = [[int(rng.integers(n)) for n in shapes[layer]] for layer in layers]
        full = [place + [None] * (3 - len(place)) for place in places]
        return layers, full, rng.standard_normal(len(x)).tolist()

    def run() -> Tensor:
        layers, places, values = draw()
        dims = {f"dim{i + 1}": [place[i] for place in places] for i in range(3)}
        return injector.declare_neuron_fi(batch=list(range(len(x))), layer_num=layers, value=values, **dims)(x)

    def run_check() -> Tensor:
        layers, places, values = draw()

        def hook(number: int) -> Callable:
            def put(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
                y = y.clone()
                for row, (layer, place, value) in enumerate(zip(layers, places, values)):
                    if layer == number:
                        y[(row, *(p for p in place if p is not None))] = value
                return y

            return put

        handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
        y = model(x)
        for handle in handles:
            handle.remove()
        return y

    return run_check if check else run
