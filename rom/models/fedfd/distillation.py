"""The server's part: the global model learns the features of every group's model through a projection of its own.

The paper's page confirms feature distillation after aggregation, one projection per client architecture, and an
orthogonal re-parameterisation of it. Everything marked "assumed" in `Distillation` is this package's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import rom.nn
import rom.ops
from rom.models.fedfd.clients import FeatureClassifier

PROJECTIONS = ("orthogonal", "linear", "none")
NORMALIZATIONS = ("layer", "l2", "none")
LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


@dataclass(frozen=True)
class Distillation:
    """How the server distils.

    Args:
        projection: "orthogonal" (FedFD), "linear" (the same without the constraint), "none" (features are compared
            coordinate by coordinate, as many as both models have).
        orthogonal_map: assumed; see `rom.nn.orthogonal`. None is what code of this kind uses: matrix_exp for square
            projections, householder for others.
        feature_weight, logit_weight: of the two losses (assumed: 1 and 1); both 0 leave the average as it is. Features
            alone move under a head that nobody trains: with logit_weight 0, 40 steps took a global model of .60 to .49
            and one of .80 to .60, with both losses to .87 and .82 (docs/fedfd.md).
        feature_loss: assumed; "mse" or "smooth_l1".
        normalization: of features before the loss (assumed): "layer" (zero mean, unit variance), "l2" or "none".
        temperature: of the logit loss (assumed).
        steps, batch_size, learning_rate: of Adam on the proxy data (assumed), the rate annealed to 0 along a cosine;
            projections have no weight decay.
    """

    projection: str = "orthogonal"
    orthogonal_map: str | None = "cayley"
    feature_weight: float = 1.0
    logit_weight: float = 1.0
    feature_loss: str = "mse"
    normalization: str = "layer"
    temperature: float = 1.0
    steps: int = 40
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        """ValueError for a choice there is not."""
        for name, choices in (
            ("projection", PROJECTIONS), ("feature_loss", tuple(LOSSES)), ("normalization", NORMALIZATIONS)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"Distillation: expected {name} of {choices}, got {getattr(self, name)!r}.")


#: The methods that are compared, as changes of `Distillation`.
METHODS: dict[str, dict[str, object]] = {
    "fedavg": {"feature_weight": 0.0, "logit_weight": 0.0},  # the average within each group, and nothing else
    "feddf": {"feature_weight": 0.0},  # Lin et al., "Ensemble Distillation ...", 2020
    "features": {"projection": "none"},
    "linear": {"projection": "linear"},
    "fedfd": {"projection": "orthogonal", "orthogonal_map": "cayley"},
    "fedfd-householder": {"projection": "orthogonal", "orthogonal_map": "householder"},
}


def make_projection(student: int, teacher: int, how: Distillation) -> nn.Module:
    """From the student's features to a teacher's, starting at the identity (its leading part for unequal widths)."""
    if how.projection == "none":
        return _Leading(min(student, teacher))
    layer = nn.Linear(student, teacher, bias=False)
    nn.init.eye_(layer.weight)
    return rom.nn.orthogonal(layer, orthogonal_map=how.orthogonal_map) if how.projection == "orthogonal" else layer


class _Leading(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, : self.count]


def orthogonality(projections: nn.ModuleDict) -> float:
    """max |MᵀM − I| (MMᵀ for wide M) over the orthogonal projections; 0 without any."""
    constrained = [layer for layer in projections.values() if isinstance(layer, nn.Linear) and is_parametrized(layer)]
    return max((rom.ops.orthogonality_error(layer.weight.detach()).item() for layer in constrained), default=0.0)


@dataclass(frozen=True)
class Teacher:
    """A group's averaged model, its share of the examples, and the name of its projection."""

    name: str
    model: FeatureClassifier
    share: float


def distill(
    student: FeatureClassifier,
    teachers: Sequence[Teacher],
    projections: nn.ModuleDict,
    proxy: torch.Tensor,
    how: Distillation,
    generator: torch.Generator,
) -> float:
    """Trains the student and the projections on proxy images `[n, …]`; returns the last step's loss."""
    if not (how.feature_weight or how.logit_weight):
        return 0.0
    features, logits = _lessons(teachers, proxy)
    optimizer = torch.optim.Adam(
        [{"params": student.parameters()}, {"params": projections.parameters()}], lr=how.learning_rate, fused=True
    )
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    student.train()
    loss = torch.zeros(())
    for _ in range(how.steps):
        chosen = torch.randint(len(proxy), (min(how.batch_size, len(proxy)),), generator=generator)
        ours = student.features(proxy[chosen])
        loss = torch.zeros(())
        if how.feature_weight:
            pairs = [(t.share, projections[t.name], z[chosen]) for t, z in zip(teachers, features)]
            distances = [share * _distance(projection, ours, z, how) for share, projection, z in pairs]
            loss = loss + how.feature_weight * torch.stack(distances).sum()
        if how.logit_weight:
            loss = loss + how.logit_weight * _divergence(student.head(ours), logits[chosen], how.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return loss.item()


@torch.no_grad()
def _lessons(teachers: Sequence[Teacher], proxy: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every teacher's features of the proxy images, and the mean of their logits by share: once, they do not learn."""
    features = [torch.cat([teacher.model.features(part) for part in proxy.split(512)]) for teacher in teachers]
    logits = torch.stack([t.share * t.model.head(z) for t, z in zip(teachers, features)]).sum(0)
    return features, logits


def _distance(projection: nn.Module, ours: torch.Tensor, theirs: torch.Tensor, how: Distillation) -> torch.Tensor:
    if isinstance(projection, _Leading):
        theirs = projection(theirs)
    a, b = (_normalized(features, how.normalization) for features in (projection(ours), theirs))
    return LOSSES[how.feature_loss](a, b)


def _divergence(ours: torch.Tensor, ensemble: torch.Tensor, temperature: float) -> torch.Tensor:
    a, b = F.log_softmax(ours / temperature, -1), F.log_softmax(ensemble / temperature, -1)
    return temperature**2 * F.kl_div(a, b, reduction="batchmean", log_target=True)


def _normalized(features: torch.Tensor, how: str) -> torch.Tensor:
    if how == "layer":
        return F.layer_norm(features, features.shape[-1:])
    return F.normalize(features, dim=-1) if how == "l2" else features
