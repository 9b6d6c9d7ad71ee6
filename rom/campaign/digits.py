"""The example of `rom campaign run`: a small convolutional net for scikit-learn's digits, trained in seconds."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from rom import files
from rom.models.fedfd.data import Split, digits, split

EPOCHS, BATCH, SEED = 20, 64, 0


def evaluation_set() -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs [359, 1, 8, 8], labels [359]): a fifth of the digits, which the net was not trained on."""
    test = _split().test
    return test.images, test.labels


def net() -> nn.Sequential:
    """Two convolutions, a pooling and a linear layer: 9,930 parameters, untrained."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(32 * 4 * 4, 10),
        )
    )


def trained(folder: Path) -> nn.Module:
    """The net after training, in `eval()`; kept in `folder`, so that a campaign that is resumed finds the same one."""
    path, model = folder / "digits-cnn.pt", net()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums on any machine of this kind, so that shards train the same net
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            _train(model := net())
    finally:
        torch.set_num_threads(threads)
    with files.replacing(path) as partial:
        torch.save(model.state_dict(), partial)
    return model.eval()


def _train(model: nn.Module) -> None:
    train = _split().train
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(train.images[batch]), train.labels[batch]).backward()
            optimizer.step()


def _split() -> Split:
    return split(digits(), SEED, test=0.2, proxy=0.0)
