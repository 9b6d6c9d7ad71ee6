"""Which part of a text-guided classifier makes it resilient? Its heads, with and without the injector's clamp.

The published figures come from an injector that clamps a flipped value to the largest magnitude its layer had on the
training data. Here the clamp is one factor of the ablation, and the head is the other.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from rom import faults
from rom.campaign import Engine, exhaustive_last_layer
from rom.models.fedfd.data import Images
from rom.models.text_guided.classifier import TextGuidedClassifier
from rom.models.text_guided.features import TextFeatures, random_text_features, shuffled

#: Table of the head's initial rows, and whether it compares by cosine; "linear" is a classifier without either.
HEADS: dict[str, tuple[str, bool] | None] = {
    "linear": None,
    "cosine, text": ("text", True),
    "cosine, shuffled text": ("shuffled", True),
    "cosine, random": ("random", True),
    "no norm, text": ("text", False),
    "no norm, random": ("random", False),
}
RESCALED = "linear, rescaled"  # made of the trained linear head, see `Rescaled`
CLAMPS = ("none", "profiled")
_STRATA = (faults.bits_of(torch.float32, "mantissa"), tuple(range(23, 32)))
_SHARES = (0.1, 0.9)
LAST = "head"  # the paper's "last layer": logits of the linear head, cosines of the others


def _cnn(shape: Sequence[int], width: int) -> nn.Module:
    sizes = [shape[0], width // 4, width // 2, width]
    layers: list[nn.Module] = []
    for stride, before, after in zip((1, 2, 2), sizes, sizes[1:]):
        layers.append(nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _mlp(shape: Sequence[int], width: int) -> nn.Module:
    # Without batch norm, 1 of 6 cosine heads collapsed to one class at the ResNets' learning rate.
    sizes = [math.prod(shape), 2 * width, width]
    layers = (nn.Sequential(nn.Linear(m, n), nn.BatchNorm1d(n), nn.ReLU()) for m, n in pairwise(sizes))
    return nn.Sequential(nn.Flatten(), *layers)


#: Images of a shape to `[batch, width]`: three convolutions and a mean, or two linear layers; batch norm in both.
TRUNKS = {"cnn": _cnn, "mlp": _mlp}


def build(
    head: str, text: TextFeatures, seed: int, trunk: str = "cnn", shape: Sequence[int] = (1, 8, 8), width: int = 64
) -> nn.Module:
    """A classifier of images of a shape, with one of `HEADS` on one of `TRUNKS`; of one seed, all begin with one trunk.

    The layers of all of them have the same names, `backbone.features.*` and `head`; those with an embedding also have
    `backbone.projection`. The global random state is not touched.
    """
    classes, embedding = text.table.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = TRUNKS[trunk](shape, width)
        how = HEADS[head]
        if how is None:
            backbone = nn.Sequential(OrderedDict(features=features))
            return nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(width, classes)))
        tables = {
            "text": lambda: text,
            "shuffled": lambda: shuffled(text, seed),
            "random": lambda: random_text_features(classes, embedding, seed),
        }
        return TextGuidedClassifier(features, tables[how[0]](), features=width, normalize=how[1])


class Rescaled(nn.Module):
    """The linear classifier with its last layer divided by a power of two, and the results multiplied by it.

    The same logits, bit for bit; but what the last layer holds stays below 2, as cosines do. From 1/8 to 2 the bits 25
    to 29 of a float32 are 1: a flip makes the value small, where it makes one above 2 huge.
    """

    def __init__(self, linear: nn.Module, bound: float) -> None:
        super().__init__()
        self.backbone, self.head = linear.backbone, copy.deepcopy(linear.head)
        self.factor = 2.0 ** (math.frexp(bound)[1] - 1)
        with torch.no_grad():
            for parameter in self.head.parameters():  # type: ignore[union-attr]
                parameter.div_(self.factor)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.factor * self.head(self.backbone(images))  # type: ignore[operator]


def answers(model: nn.Module, data: Images) -> tuple[float, float, torch.Tensor]:
    """(accuracy, mean difference of the two largest probabilities, which images are answered correctly)."""
    with torch.no_grad():
        probabilities = model(data.images).double().softmax(1)
    top = probabilities.topk(2, 1).values
    correct = probabilities.argmax(1) == data.labels
    return correct.double().mean().item(), (top[:, 0] - top[:, 1]).mean().item(), correct


@dataclass(frozen=True)
class Damage:
    """What single bit flips in one layer's results do, on average over faults that each have an image of their own.

    delta_loss: mean |cross entropy − that without the fault| of the faults whose logits are all finite. mismatch: the
    part of all faults after which another class is largest, or some logit is NaN or infinite. due: the part of the
    latter alone. bound: the clamp, or the layer's largest magnitude on the training data when there is none. by_bit:
    the mismatch of the flips of bits 0 to 31; their mean is `mismatch`.
    """

    layer: str
    clamp: str
    faults: int
    delta_loss: float
    mismatch: float
    due: float
    bound: float
    by_bit: list[float]


def damage(
    model: nn.Module, train: Images, test: Images, faults_per_layer: int, seed: int, batch_size: int = 256
) -> list[Damage]:
    """Injects single bit flips into the results of every convolution and linear layer, float32, all 32 bits alike.

    The last layer's are all evaluated, images × classes × bits, in closed form; of every other layer a sample of
    `faults_per_layer` without replacement, a tenth of it in the mantissa, whose 23 bits hardly ever do anything:
    averages weigh the two strata by their sizes. A layer that two models share is hit in the same images, places and
    bits in both.

    With the clamp, the whole result of the layer that is hit is restricted to ± its largest magnitude on the training
    data, NaN to +, and that is done in the run without faults as well.
    """
    found = faults.survey(model, test.images[:2])
    bounds = {name: max(abs(low), abs(high)) for name, (low, high) in found.profile([train.images]).items()}
    results = []
    for layer, bound in bounds.items():
        for clamp in CLAMPS:
            limits = (-bound, bound) if clamp == "profiled" else None
            if layer == LAST:
                results.append(_every_fault(model, test, clamp, bound, limits))
                continue
            strata = [s for bits in _STRATA for s in found.strata(len(test), layers=[layer], bits=bits)]
            counts = [min(int(share * faults_per_layer), s.size) for share, s in zip(_SHARES, strata)]
            plan = faults.FaultPlan.stratified(strata, counts, seed)
            restriction = None if limits is None else {layer: limits}
            engine = Engine(found, plan, test.images, test.labels, batch_size=batch_size, bounds=restriction)
            results.append(_summary(plan, engine.run(np.arange(len(plan))), layer, clamp, bound))
    return results


def _every_fault(
    model: nn.Module, test: Images, clamp: str, bound: float, limits: tuple[float, float] | None
) -> Damage:
    """The last layer: without sampling."""
    inner = model.embed if isinstance(model, TextGuidedClassifier) else model.backbone
    with torch.no_grad():
        values = model.head(inner(test.images))  # type: ignore[operator]
    found = exhaustive_last_layer(values, test.labels, scale=_scale(model), bounds=limits)
    total, wrong = found.mean(), sum(found.rate(name) for name in ("sdc", "critical", "due"))
    return Damage(
        LAST,
        clamp,
        int(found.cells.sum()),
        total["delta_loss"],
        total["sdc"] + total["critical"] + total["due"],
        total["due"],
        bound,
        np.mean(wrong, 0).tolist(),
    )


def _scale(model: nn.Module) -> float:
    if isinstance(model, Rescaled):
        return model.factor
    scale = getattr(model, "logit_scale", None)
    return 1.0 if scale is None else scale.exp().item()


def _summary(plan: faults.FaultPlan, rows: np.ndarray, layer: str, clamp: str, bound: float) -> Damage:
    """A sampled layer: every fault meets one image, so that a row is a cell."""
    weight = np.array([s.size / n for s, n in zip(plan.strata, plan.counts)])[rows["stratum"]]
    weight /= weight.sum()
    due = rows["due"] > 0
    wrong = due | (rows["sdc"] > 0) | (rows["critical"] > 0)
    finite = weight[~due].sum()
    bit = np.log2(rows["old"] ^ rows["new"]).astype(np.int64)
    flips = np.bincount(bit, minlength=32)
    return Damage(
        layer,
        clamp,
        len(rows),
        float((weight * rows["delta_loss"]).sum() / finite) if finite else float("nan"),
        float(weight[wrong].sum()),
        float(weight[due].sum()),
        bound,
        (np.bincount(bit, wrong, minlength=32) / np.maximum(flips, 1)).tolist(),
    )


def measure(models: Mapping[str, nn.Module], train: Images, test: Images, faults_per_layer: int, seed: int) -> Any:
    """What the table needs of one seed's trained models (of `HEADS`, "linear" among them), as plain values by head.

    Also of the linear one, rescaled. All are scored on the same images: those of the test data that all of them answer
    correctly; ValueError when there are none.
    """
    with torch.no_grad():
        largest = models["linear"](train.images).abs().max().item()
    models = {"linear": models["linear"], RESCALED: Rescaled(models["linear"], largest).eval(), **models}
    found = {head: answers(model, test) for head, model in models.items()}
    common = torch.stack([correct for _, _, correct in found.values()]).all(0).nonzero()[:, 0].numpy()
    if len(common) < 2:
        raise ValueError(
            f"ablation: no image is answered correctly by all heads (accuracies "
            f"{', '.join(f'{head}: {accuracy:.3f}' for head, (accuracy, _, _) in found.items())}): a training has "
            "failed. Lower the learning rate."
        )
    shared = test[common]
    return {
        head: {
            "accuracy": found[head][0],
            "top2_difference": answers(model, shared)[1],
            "images": len(shared),
            "scale": _scale(model),
            "damage": [asdict(d) for d in damage(model, train, shared, faults_per_layer, seed)],
        }
        for head, model in models.items()
    }
