"""Which part of a text-guided classifier makes it resilient? Its heads, with and without the injector's clamp.

The published figures come from an injector that clamps a flipped value to the largest magnitude its layer had on the
training data. Here the clamp is one factor of the ablation, and the head is the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rom import faults
from rom.campaign.records import RESULT
from rom.faults.inject import inject
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
CLAMPS = ("none", "profiled")
_STRATA = (faults.bits_of(torch.float32, "mantissa"), tuple(range(23, 32)))
_SHARES = (0.1, 0.9)
LAST = "head"  # the paper's "last layer": logits of the linear head, cosines of the others


def _cnn(channels: int, side: int, width: int) -> nn.Module:
    sizes = [channels, width // 4, width // 2, width]
    layers: list[nn.Module] = []
    for stride, before, after in zip((1, 2, 2), sizes, sizes[1:]):
        layers.append(nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _mlp(channels: int, side: int, width: int) -> nn.Module:
    first = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 2 * width), nn.ReLU())
    return nn.Sequential(first, nn.Sequential(nn.Linear(2 * width, width), nn.ReLU()))


#: `[batch, channels, side, side]` to `[batch, width]`: three convolutions with batch norm and a mean, or two layers.
TRUNKS = {"cnn": _cnn, "mlp": _mlp}


def build(
    head: str, text: TextFeatures, seed: int, trunk: str = "cnn", channels: int = 1, side: int = 8, width: int = 64
) -> nn.Module:
    """A classifier with one of `HEADS` on one of `TRUNKS`; of one seed, all heads begin with the same trunk.

    The layers of all of them have the same names, `backbone.features.*` and `head`; those with an embedding also have
    `backbone.projection`. The global random state is not touched.
    """
    classes, embedding = text.table.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = TRUNKS[trunk](channels, side, width)
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
    model: nn.Module, train: Images, test: Images, faults_per_layer: int, seed: int, batch_size: int = 1024
) -> list[Damage]:
    """Injects single bit flips into the results of every convolution and linear layer, float32, all 32 bits alike.

    The last layer's are all injected, images × classes × bits; of every other layer a sample of `faults_per_layer`
    without replacement, a tenth of it in the mantissa, whose 23 bits hardly ever do anything: averages weigh the two
    strata by their sizes. A layer that two models share is hit in the same images, places and bits in both.

    With the clamp, the whole result of the layer that is hit is restricted to ± its largest magnitude on the training
    data, NaN to +, and that is done in the run without faults as well.
    """
    found = faults.survey(model, test.images[:2])
    bounds = {name: max(abs(low), abs(high)) for name, (low, high) in found.profile([train.images]).items()}
    results = []
    for layer, bound in bounds.items():
        strata = [s for bits in _STRATA for s in found.strata(len(test), layers=[layer], bits=bits)]
        counts = [int(share * faults_per_layer) for share in _SHARES]
        if layer == LAST or any(count >= s.size for count, s in zip(counts, strata)):
            plan = faults.FaultPlan.exhaustive(strata)
        else:
            plan = faults.FaultPlan.stratified(strata, counts, seed)
        for clamp in CLAMPS:
            restriction = {layer: (-bound, bound)} if clamp == "profiled" else None
            rows = _run(found, plan, test, restriction, batch_size)
            results.append(_summary(plan, rows, layer, clamp, bound))
    return results


def _summary(plan: faults.FaultPlan, rows: np.ndarray, layer: str, clamp: str, bound: float) -> Damage:
    weight = np.array([s.size / n for s, n in zip(plan.strata, plan.counts)])[rows["stratum"]]
    weight /= weight.sum()
    due = rows["due"] > 0
    finite = weight[~due].sum()
    wrong = (rows["mismatch"] > 0) | due
    bit = np.log2(plan.take(rows["position"]).sites["xor_mask"]).astype(np.int64)
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


def _run(
    found: faults.Survey,
    plan: faults.FaultPlan,
    test: Images,
    bounds: Mapping[str, tuple[float, float]] | None,
    batch_size: int,
) -> np.ndarray:
    model = inject(found, plan, bounds=bounds)
    model.arm(plan[:0])
    rows = np.zeros(len(plan), RESULT)
    rows["position"] = np.arange(len(plan))
    with torch.inference_mode():
        golden = model(test.images).double()
        losses = nn.functional.cross_entropy(golden, test.labels, reduction="none")
        top = golden.argmax(1)
        for start in range(0, len(plan), batch_size):
            armed = plan[start : start + batch_size]
            sample = torch.from_numpy(armed.sites["sample"].astype(np.int64))
            model.arm_rows(armed)
            logits = model(test.images[sample]).double()
            part = rows[start : start + batch_size]
            part["stratum"] = armed.stratum
            part["due"] = ~torch.isfinite(logits).all(1).numpy()
            part["mismatch"] = (logits.argmax(1) != top[sample]).numpy()
            change = nn.functional.cross_entropy(logits, test.labels[sample], reduction="none") - losses[sample]
            part["delta_loss"] = np.where(part["due"] > 0, 0.0, change.abs().numpy())
    return rows


def measure(models: Mapping[str, nn.Module], train: Images, test: Images, faults_per_layer: int, seed: int) -> Any:
    """What the table needs of one seed's trained models, as plain values by head.

    All heads are scored on the same images: those of the test data that all of them answer correctly.
    """
    found = {head: answers(model, test) for head, model in models.items()}
    common = torch.stack([correct for _, _, correct in found.values()]).all(0).nonzero()[:, 0].numpy()
    shared = test[common]
    record = {}
    for head, model in models.items():
        scale = getattr(model, "logit_scale", None)
        record[head] = {
            "accuracy": found[head][0],
            "top2_difference": answers(model, shared)[1],
            "images": len(shared),
            "scale": 1.0 if scale is None else scale.exp().item(),
            "damage": [asdict(d) for d in damage(model, train, shared, faults_per_layer, seed)],
        }
    return record
