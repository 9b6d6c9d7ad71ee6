"""What a Mamba model remembers of the tokens it has seen: fixed in size, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RoutingMambaCache:
    """The convolution and scan states of every layer, for `batch` sequences.

    Routing adds nothing: all experts share one state trajectory, so this is as large as dense Mamba's.

    Attributes:
        conv: `[n_layer, batch, d_inner, d_conv]` in the model's dtype, the convolutions' last inputs, newest last.
        ssm: `[n_layer, batch, d_inner, d_state]`, float32 (float64 for a float64 model).

    `cache[i]` is layer i's pair `(conv, ssm)`; forward and step update them in place.
    """

    def __init__(self, conv: torch.Tensor, ssm: torch.Tensor) -> None:
        self.conv, self.ssm = conv, ssm

    @property
    def batch(self) -> int:
        """Sequences it holds."""
        return self.conv.shape[1]

    def __len__(self) -> int:
        return self.conv.shape[0]

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv[layer], self.ssm[layer]

    def reset(self) -> None:
        """Forgets everything: the next token is the first."""
        self.conv.zero_()
        self.ssm.zero_()

    def clone(self) -> RoutingMambaCache:
        """An independent copy: to try a continuation and come back, or to keep a shared prompt."""
        return RoutingMambaCache(self.conv.clone(), self.ssm.clone())

    def select(self, sequences: torch.Tensor | Sequence[int]) -> RoutingMambaCache:
        """A copy holding these sequences in this order; repeat one to continue it in several ways (beams)."""
        index = torch.as_tensor(sequences, device=self.conv.device, dtype=torch.long)
        return RoutingMambaCache(self.conv.index_select(1, index), self.ssm.index_select(1, index))
