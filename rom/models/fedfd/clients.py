"""Small image classifiers of different architectures: what the clients of a federation train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class FeatureClassifier(nn.Module):
    """A backbone and a linear head.

    Attributes:
        feature_dim: width of the features, the backbone's output.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.feature_dim = backbone, feature_dim
        self.head = nn.Linear(feature_dim, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, height, width]` to `[batch, feature_dim]`."""
        return self.backbone(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, num_classes]`."""
        return self.head(self.features(images))


@dataclass(frozen=True)
class Group:
    """Clients that share a model: an architecture of `ARCHITECTURES` at a fraction of its full width.

    Narrower models of one architecture are leading slices of the wider ones' tensors, as in HeteroFL (Diao et al.,
    2021). No layer keeps running statistics: they would not survive averaging over clients.
    """

    architecture: str
    width: float = 1.0

    @property
    def name(self) -> str:
        """`cnn`, or `cnn@0.5` for a narrower one."""
        return self.architecture if self.width == 1 else f"{self.architecture}@{self.width:g}"

    @classmethod
    def parse(cls, text: str) -> Group:
        """The inverse of `name`; ValueError for an unknown architecture or a width outside (0, 1]."""
        architecture, _, width = text.partition("@")
        try:
            group = cls(architecture, float(width or 1))
        except ValueError:
            group = cls(architecture, -1.0)
        if architecture not in ARCHITECTURES or not 0 < group.width <= 1:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(
                f"group {text!r}: expected ARCHITECTURE or ARCHITECTURE@WIDTH, of {known}, 0 < WIDTH <= 1."
            )
        return group

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> FeatureClassifier:
        """The model, freshly initialised. image_shape: (channels, height, width)."""

        def scaled(full: int) -> int:
            return max(4, round(full * self.width / 4) * 4)  # 4: the transformer's heads

        return ARCHITECTURES[self.architecture](image_shape, num_classes, scaled)


Scale = Callable[[int], int]


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # One normalisation group: the mean and variance of a slice of channels stay those of that slice.
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(1, outputs), nn.ReLU())


def _cnn(shape: tuple[int, int, int], num_classes: int, scaled: Scale) -> FeatureClassifier:
    a, b, features = scaled(16), scaled(32), scaled(64)
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * b, features), nn.ReLU()]
    return FeatureClassifier(
        nn.Sequential(_convolution(shape[0], a), _convolution(a, b, 2), *pooled), features, num_classes
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _deep_cnn(shape: tuple[int, int, int], num_classes: int, scaled: Scale) -> FeatureClassifier:
    a, b, features = scaled(24), scaled(48), scaled(96)
    layers = [_convolution(shape[0], a), _Residual(a), _convolution(a, b, 2), _Residual(b)]
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * b, features), nn.ReLU()]
    return FeatureClassifier(nn.Sequential(*layers, *pooled), features, num_classes)


class _PatchTransformer(nn.Module):
    def __init__(self, shape: tuple[int, int, int], features: int, patch: int = 2, layers: int = 2) -> None:
        super().__init__()
        channels, height, width = shape
        self.patches = nn.Conv2d(channels, features, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (height // patch) * (width // patch), features) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(features, 4, 2 * features, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(1)


def _transformer(shape: tuple[int, int, int], num_classes: int, scaled: Scale) -> FeatureClassifier:
    return FeatureClassifier(_PatchTransformer(shape, scaled(48)), scaled(48), num_classes)


class _Perceptron(nn.Sequential):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(images))


def _mlp(shape: tuple[int, int, int], num_classes: int, scaled: Scale) -> FeatureClassifier:
    hidden, features = scaled(128), scaled(80)
    inputs = shape[0] * shape[1] * shape[2]
    layers = [nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, features)]
    return FeatureClassifier(_Perceptron(*layers), features, num_classes)


ARCHITECTURES = {"cnn": _cnn, "deep-cnn": _deep_cnn, "transformer": _transformer, "mlp": _mlp}
