"""`TextGuidedClassifier`: a backbone, a projection, and cosine similarity to one embedding per class."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from rom.models.text_guided.checkpoints import load_state, read_checkpoint
from rom.models.text_guided.features import TextFeatures, as_text_features, random_text_features

LOGIT_SCALE = math.log(1 / 0.07)  # CLIP's initial temperature; exp of it is 14.3
PARTS = ("backbone", "head", "logit_scale")


class TextGuidedClassifier(nn.Module):
    """logits = exp(logit_scale) · W f / ‖f‖₂ with f the backbone's projection, W one embedding per class.

    W starts as the mean text embedding of each class, scaled to length 1 once; then it is trained like everything else,
    and its rows do not keep that length. The state dict is that of the released checkpoints: `backbone.*`,
    `head.weight`, `logit_scale`.

    Args:
        backbone: any module whose output is `[batch, E]`, or, with `features`, `[batch, features]`. Or the name of a
            torchvision model, whose last layer is then made E wide: that layer is the released code's projection.
        text_features: `[C, E]`, or `[C, D, E]` for D descriptions per class, which are averaged; a `TextFeatures`
            also carries where they come from. An int C is `random_text_features(C)`: no text at all, and marked so.
        features: width of the backbone's output; a linear projection to E is then appended to the backbone.
        normalize: False leaves out norm and scale, logits = W f: a control for ablations.
        eps: ‖f‖ is taken for at least this much. The default, 0, is the released code: f = 0 gives NaN logits.
        freeze: of "backbone", "head", "logit_scale": what is not trained. (The released code's `freeze_head` sets an
            attribute of the module and freezes nothing.)

    Attributes:
        text_source: where the head's initial values come from, in words.

    Raises:
        ValueError: a table that is not finite, has a row of zeros or another shape, or an unknown part to freeze.
        ImportError: a torchvision name without torchvision.

    Source: arXiv 2311.14062 and its released code (class `CLIPGuidedClassifier`).

    >>> from rom.models import TextGuidedClassifier, text_guided
    >>> table = text_guided.random_text_features(classes=10, width=512)
    >>> model = TextGuidedClassifier(torch.nn.Flatten(), table, features=64)
    >>> model(torch.randn(2, 1, 8, 8)).shape, model.text_source
    (torch.Size([2, 10]), 'no text: random orthonormal, seed 0')
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        text_features: TextFeatures | torch.Tensor | int,
        *,
        features: int | None = None,
        normalize: bool = True,
        eps: float = 0.0,
        freeze: Iterable[str] = (),
    ) -> None:
        super().__init__()
        found = random_text_features(text_features) if isinstance(text_features, int) else text_features
        found = as_text_features(found)
        classes, width = found.table.shape
        if isinstance(backbone, str):
            backbone = torchvision_backbone(backbone, width)
        if features is not None:
            backbone = nn.Sequential(OrderedDict(features=backbone, projection=nn.Linear(features, width)))
        self.backbone = backbone
        self.head = nn.Linear(width, classes, bias=False)
        self.normalize, self.eps, self.text_source = normalize, eps, found.source
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE)) if normalize else None
        with torch.no_grad():
            self.head.weight.copy_(found.table / found.table.norm(dim=1, keepdim=True))
        self.freeze(freeze)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """`[batch, …]` to the projections `[batch, E]`, of length 1 with `normalize`."""
        f = self.backbone(images)
        if f.dim() != 2 or f.shape[1] != self.head.in_features:
            raise ValueError(
                f"TextGuidedClassifier: expected a backbone with output [batch, {self.head.in_features}], the width of "
                f"the text features, got {list(f.shape)}. Give features=WIDTH for a projection."
            )
        if not self.normalize:
            return f
        norm = f.norm(dim=1, keepdim=True)
        return f / (norm.clamp_min(self.eps) if self.eps else norm)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, C]`."""
        cosines = self.head(self.embed(images))
        return cosines if self.logit_scale is None else self.logit_scale.exp() * cosines

    def freeze(self, parts: Iterable[str]) -> None:
        """Trains all but these parts: of "backbone", "head", "logit_scale"."""
        chosen = {parts} if isinstance(parts, str) else set(parts)
        if unknown := sorted(chosen - set(PARTS)):
            raise ValueError(f"TextGuidedClassifier: expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}.")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] not in chosen)

    @classmethod
    def from_checkpoint(cls, backbone: nn.Module | str, path: str | Path, ema: bool = False) -> TextGuidedClassifier:
        """A model with the values of a released checkpoint; C and E are those of its head.

        backbone: as in the constructor. ema: the running averages instead of the last values. ValueError: the file is
        damaged, or its tensors are not those of this backbone.
        """
        state = read_checkpoint(path, ema)
        if "head.weight" not in state or state["head.weight"].dim() != 2:
            raise ValueError(f"{path} has no head.weight [classes, width]: it is no text-guided classifier's.")
        model = cls(backbone, TextFeatures(torch.ones_like(state["head.weight"]).float(), f"checkpoint {path}"))
        load_state(model, state, str(path))
        return model

    def extra_repr(self) -> str:
        """What a print of the model says beside its parts."""
        return f"text={self.text_source!r}, normalize={self.normalize}, eps={self.eps}"


def torchvision_backbone(name: str, width: int) -> nn.Module:
    """A torchvision classifier, randomly initialised, whose last layer has `width` outputs, as in the released code."""
    try:
        from torchvision import models  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError(
            f"The backbone {name!r} needs torchvision: pip install torchvision. Or give a torch.nn.Module."
        ) from error
    return models.get_model(name, weights=None, num_classes=width)
