"""What a fault did: one outcome per cell (fault × sample), added up per fault."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from rom.campaign.records import OUTCOMES, RESULT

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class Cells(NamedTuple):
    """Some cells: per outcome whether it is theirs, whether top-1 changed, and how much the loss did."""

    outcomes: dict[str, np.ndarray]
    mismatch: np.ndarray
    delta_loss: np.ndarray


def bits(x: torch.Tensor) -> torch.Tensor:
    """The words of a floating tensor: NaN equals itself, −0 is not 0."""
    return x.contiguous().view(_WORDS[x.element_size()])


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per row, in float64; NaN where a logit is not finite. A row's value does not depend on its neighbours."""
    with np.errstate(invalid="ignore", over="ignore"):
        top = logits.max(1)
        rest = np.log(np.exp(logits - top[:, None]).sum(1))
        return rest + (top - logits[np.arange(len(logits)), labels])


class Golden:
    """The run without faults.

    logits `[N, C]`, top1 int64 `[N]`, loss float64 `[N]` (cross entropy of each sample), all on the CPU; accuracy.
    """

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.logits, self.labels = logits.cpu(), labels.cpu()
        wide = self.logits.double().numpy()
        self.top1 = torch.from_numpy(wide.argmax(1))
        self.loss = torch.from_numpy(cross_entropy(wide, self.labels.numpy()))
        self.right = (self.top1 == self.labels).numpy()
        self.accuracy = float(self.right.mean())
        self._bits = bits(self.logits).numpy()

    def judge(self, logits: torch.Tensor, samples: np.ndarray) -> Cells:
        """The outcomes of faulty logits `[n, C]` of these samples."""
        logits = logits.cpu()
        wide = logits.double().numpy()
        masked = (bits(logits).numpy() == self._bits[samples]).all(1)
        due = ~masked & ~np.isfinite(wide).all(1)
        mismatch = wide.argmax(1) != self.top1.numpy()[samples]
        other = mismatch & ~due & ~masked
        right = self.right[samples]
        outcomes = {
            "masked": masked,
            "tolerable": ~masked & ~due & ~mismatch,
            "sdc": other & ~right,
            "critical": other & right,
            "due": due,
        }
        delta = abs(cross_entropy(wide, self.labels.numpy()[samples]) - self.loss.numpy()[samples])
        return Cells(outcomes, mismatch, np.where(masked | due, 0.0, delta))


class Tally:
    """The RESULT records of some faults, filled cell by cell."""

    def __init__(self, positions: np.ndarray, golden: Golden) -> None:
        self.golden = golden
        self.results = np.zeros(len(positions), RESULT)
        self.results["position"] = positions
        self._pending: list[tuple[torch.Tensor, np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def masked(self, faults: np.ndarray) -> None:
        """A cell of each of these faults (numbers in `results`) has the golden outputs."""
        np.add.at(self.results["masked"], faults, 1)

    def judge(self, logits: torch.Tensor, samples: np.ndarray, faults: np.ndarray) -> None:
        """Cells with outputs of their own. A fault's cells come in the order of samples, however they are cut."""
        self._pending.append((logits, samples, faults))
        self._waiting += len(samples)
        if self._waiting >= 4096:  # 32 rows at a time cost 100 µs, as much as the MLP's forward pass behind its middle
            self._judge()

    def _judge(self) -> None:
        if not self._pending:
            return
        logits, samples, faults = zip(*self._pending)
        self._pending, self._waiting = [], 0
        faults = np.concatenate(faults)
        cells = self.golden.judge(torch.cat(logits), np.concatenate(samples))
        for name, which in {**cells.outcomes, "mismatch": cells.mismatch}.items():
            np.add.at(self.results[name], faults[which], 1)
        np.add.at(self.results["delta_loss"], faults, cells.delta_loss)

    def done(self) -> np.ndarray:
        """The records; every cell must have been met once."""
        self._judge()
        met = sum(self.results[name] for name in OUTCOMES)
        if not np.array_equal(met, self.results["cells"]):
            raise RuntimeError("rom.campaign: a cell was lost or counted twice. This is an error of rom: report it.")
        return self.results
