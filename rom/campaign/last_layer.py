"""Every single-bit fault of a classifier's last layer: exact sums, without sampling and so without intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rom import ops
from rom.campaign.records import OUTCOMES
from rom.ops import _op
from rom.reference import last_layer as reference

_CELLS = 1 << 22  # logits at a time where a fault changes all classes: 32 MiB in float64
COUNTS = (*OUTCOMES, "mismatch")


@dataclass(frozen=True, eq=False)
class Exhaustive:
    """What all faults did, by row and bit. A row is what `rows` says: "class", "image" or "input" of the last layer."""

    rows: str
    delta_loss: np.ndarray  # float64 [rows, bits]: Σ |Δ cross entropy| over the cells that are not due
    counts: np.ndarray  # int64 [rows, bits, 6]: cells by outcome, and those whose top-1 changes (COUNTS)

    @property
    def cells(self) -> np.ndarray:
        """Cells (fault × image), int64 `[rows, bits]`."""
        return self.counts[..., : len(OUTCOMES)].sum(-1)

    def rate(self, name: str) -> np.ndarray:
        """The fraction of cells with this outcome (or "mismatch"), float64 `[rows, bits]`."""
        if name not in COUNTS:
            raise ValueError(f"rom.campaign.Exhaustive.rate: expected one of {', '.join(COUNTS)}, got {name!r}.")
        return self.counts[..., COUNTS.index(name)] / np.maximum(self.cells, 1)

    def mean(self) -> dict[str, float]:
        """Over all faults: every rate, and "delta_loss" over the cells that are not due (nan where all are)."""
        totals = self.counts.reshape(-1, len(COUNTS)).sum(0)
        cells = max(int(self.cells.sum()), 1)
        alive = int(self.cells.sum() - totals[COUNTS.index("due")])
        rates = {name: float(total) / cells for name, total in zip(COUNTS, totals)}
        return rates | {"delta_loss": float(self.delta_loss.sum()) / alive if alive else float("nan")}


def exhaustive_last_layer(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    bounds: tuple[float, float] | None = None,
    nan_to: str = "max",
    by: str = "class",
) -> Exhaustive:
    """Flips every bit of every output of the last layer for every image, in closed form.

    Args:
        logits: `[B, C]`, float32, bfloat16 or float16: the outputs that are hit. labels: `[B]`, int64.
        scale: what the model multiplies them with, for a cosine head; None: they are the logits.
        dtype: the dtype they are stored in, if it is another.
        bounds, nan_to: range restriction after the fault, as in `rom.ops.logit_flips`.
        by: rows of the result, "class" or "image".

    The loss of a fault is log(q + p e^d) away from the golden one, p the softmax of the class that is hit, d what it
    changes by (see `rom.ops.logit_flips`): B · C · bits faults, 2 to 3 · 10⁸ a second on one thread.

    >>> from rom import campaign
    >>> found = campaign.exhaustive_last_layer(torch.eye(3), torch.arange(3))
    >>> found.delta_loss.shape, int(found.cells.sum()), round(found.mean()["critical"], 3)
    ((3, 32), 288, 0.031)
    """
    rows = _rows("exhaustive_last_layer", by, ("class", "image"))
    values = logits if dtype is None else logits.to(dtype)
    loss, counts = ops.logit_flips(
        values, labels, 1.0 if scale is None else scale, bounds, nan_to, by_image=rows == "image"
    )
    return Exhaustive(rows, loss.cpu().numpy(), counts.cpu().numpy())


def exhaustive_head_weights(
    features: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    bounds: tuple[float, float] | None = None,
    nan_to: str = "max",
    by: str = "class",
) -> Exhaustive:
    """Flips every bit of every weight of the last layer; each fault meets all images (see `rom.ops.weight_flips`).

    features: `[B, E]`, the layer's inputs (normalised, if the model does that). weight: `[C, E]`, in the same dtype.
    by: rows of the result, "class" or "input". The rest as in `exhaustive_last_layer`.
    """
    rows = _rows("exhaustive_head_weights", by, ("class", "input"))
    factor = 1.0 if scale is None else scale
    loss, counts = ops.weight_flips(features, weight, labels, bias, factor, bounds, nan_to, by_input=rows == "input")
    return Exhaustive(rows, loss.cpu().numpy(), counts.cpu().numpy())


def exhaustive_head_inputs(
    features: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float | None = None,
    normalise: bool = False,
    bounds: tuple[float, float] | None = None,
    nan_to: str = "max",
    by: str = "input",
) -> Exhaustive:
    """Flips every bit of every input f of the last layer, for every image: a rank-1 change of its logits.

        z' = W f + (f'_j − f_j) W_:j + bias,   with `normalise` W f' / ‖f'‖

    features: `[B, E]`, as they are stored when the fault hits, before the norm if `normalise`: the norm of the faulty
    vector is ‖f‖² + f'_j² − f_j², infinite where the layer's float32 overflows. by: rows, "input" or "image". The rest
    as in `exhaustive_head_weights`. A fault touches every class: C times the work of a logit's fault, in plain torch.
    """
    rows = _rows("exhaustive_head_inputs", by, ("input", "image"))
    op = "exhaustive_head_inputs"
    _op.check_same_dtype(op, "weight", weight=weight, features=features)
    if features.dim() != 2 or weight.dim() != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"rom.campaign.{op}: expected features [B, E] and weight [C, E], got {tuple(features.shape)} and "
            f"{tuple(weight.shape)}."
        )
    head = _Head(weight, bias, 1.0 if scale is None else scale, bounds, nan_to, normalise)
    images, inputs = features.shape
    bits = 8 * features.element_size()
    loss = np.zeros((images if by == "image" else inputs, bits))
    counts = np.zeros((*loss.shape, len(COUNTS)), np.int64)
    step = max(1, _CELLS // (bits * max(weight.shape[0], 1)))
    for first in range(0, images, step):
        part, label = features[first : first + step].detach(), labels[first : first + step]
        golden = head.golden(part)
        for j in range(inputs):
            lost, what = _effects(golden, head.changed(part, j), label)
            if by == "image":
                loss[first : first + step] += lost.numpy()
                counts[first : first + step] += what.numpy()
            else:
                loss[j] += lost.sum(0).numpy()
                counts[j] += what.sum(0).numpy()
    return Exhaustive(rows, loss, counts)


class _Head:
    """The logits of the last layer for features, and for features with every bit of one input flipped."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        bounds: tuple[float, float] | None,
        nan_to: str,
        normalise: bool,
    ) -> None:
        self.dtype, self.normalise = weight.dtype, normalise
        self.weight = weight.detach().double()
        self.bias = 0.0 if bias is None else bias.detach().double()
        self.tail = ops.last_layer._tail("exhaustive_head_inputs", weight.dtype, scale, bounds, nan_to)

    def _logits(self, sums: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        norm = squares.float().sqrt().double()[..., None] if self.normalise else 1.0
        return reference.to_logits((sums / norm + self.bias).to(self.dtype), *self.tail)

    def golden(self, features: torch.Tensor) -> torch.Tensor:
        f = features.double()
        return self._logits(f @ self.weight.T, f.square().sum(-1))

    def changed(self, features: torch.Tensor, j: int) -> torch.Tensor:
        """`[B, bits, C]`."""
        f = features.double()
        bits = range(8 * features.element_size())
        new = torch.stack([reference.flipped(features[:, j], bit) for bit in bits], 1).double()
        rest = f.clone()
        rest[:, j] = 0  # no difference: 3e38 − 0.5 has forgotten the 0.5
        sums = (rest @ self.weight.T)[:, None] + new[..., None] * self.weight[:, j]
        return self._logits(sums, rest.square().sum(-1, keepdim=True) + new.square())


def _effects(golden: torch.Tensor, changed: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(|Δloss|, the counts) of faults that change all logits: golden `[B, C]`, changed `[B, bits, C]`."""
    top, new_top = golden.argmax(-1, keepdim=True), changed.argmax(-1)
    due = ~changed.isfinite().all(-1)
    at_label = changed.double().gather(-1, labels[:, None, None].expand(-1, changed.shape[1], 1))[..., 0]
    golden_loss = torch.nn.functional.cross_entropy(golden.double(), labels, reduction="none")
    loss = (changed.double().logsumexp(-1) - at_label - golden_loss[:, None]).abs()
    mismatch = new_top != top
    wrong, right = mismatch & ~due, top == labels[:, None]
    same = (changed == golden[:, None]) & (changed.signbit() == golden.signbit()[:, None])
    masked = same.all(-1)
    counts = (masked, ~(masked | wrong | due), wrong & ~right, wrong & right, due, mismatch)
    return torch.where(due, 0.0, loss), torch.stack(counts, -1).long()


def _rows(function: str, by: str, known: tuple[str, ...]) -> str:
    if by not in known:
        raise ValueError(f"rom.campaign.{function}: expected by of {', '.join(known)}, got {by!r}.")
    return by
