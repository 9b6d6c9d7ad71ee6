"""Images, and how they are spread over the clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Images:
    """`images` [n, channels, height, width] float32 and their `labels` [n] int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)

    def __getitem__(self, index: np.ndarray) -> Images:
        """Those of the indices."""
        return Images(self.images[index], self.labels[index])

    @classmethod
    def from_dataset(cls, dataset: Sequence[tuple[torch.Tensor, Any]]) -> Images:
        """Any torch dataset of (image, label) pairs, read into memory."""
        pairs = [dataset[i] for i in range(len(dataset))]
        labels = torch.tensor([int(label) for _, label in pairs])
        return cls(torch.stack([torch.as_tensor(image, dtype=torch.float32) for image, _ in pairs]), labels)


@dataclass(frozen=True)
class Split:
    """What the clients train on, the server's unlabelled proxy data, and what is only ever tested on."""

    train: Images
    proxy: torch.Tensor
    test: Images
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def digits() -> Images:
    """The 1,797 handwritten digits of 8 × 8 pixels that ship with scikit-learn; no download."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - an extra

    found = load_digits()
    return Images(torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long())


def split(data: Images, seed: int, test: float = 0.2, proxy: float = 0.15) -> Split:
    """A random split into test, proxy and training data, by fractions of the whole."""
    order = np.random.default_rng([seed, 0]).permutation(len(data))
    tests, proxies = round(test * len(data)), round(proxy * len(data))
    parts = np.split(order, [tests, tests + proxies])
    return Split(data[parts[2]], data.images[parts[1]], data[parts[0]], int(data.labels.max()) + 1)


def dirichlet_partition(
    labels: torch.Tensor, clients: int, alpha: float, seed: int, least: int = 2
) -> list[np.ndarray]:
    """Indices per client: each class is shared out in proportions drawn from Dirichlet(alpha, …, alpha).

    Small alpha gives every client few classes, large alpha an even share (Hsu et al., "Measuring the Effects of
    Non-Identical Data Distribution for Federated Visual Classification", 2019). Drawn again until everyone has `least`.

    Raises:
        ValueError: more clients than data, alpha not above 0, or no draw in 1000 that gives everyone something.
    """
    if not alpha > 0:
        raise ValueError(f"dirichlet_partition: expected alpha > 0, got {alpha}.")
    if clients < 1 or clients * least > len(labels):
        raise ValueError(f"dirichlet_partition: expected 1 to {len(labels) // least} clients, got {clients}.")
    random, values = np.random.default_rng([seed, 1]), labels.numpy()
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(values):
            members = random.permutation(np.flatnonzero(values == label))
            shares = np.cumsum(random.dirichlet(np.full(clients, alpha)))[:-1]
            for part, piece in zip(parts, np.split(members, (shares * len(members)).astype(int))):
                part.append(piece)
        result = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, result)) >= least:
            return result
    raise ValueError(
        f"dirichlet_partition: no draw gave each of {clients} clients {least} examples at alpha {alpha}. "
        "Use fewer clients or a larger alpha."
    )
