"""A recurrent network of a few thousand parameters: the trainer must not know which model it trains.

Run as a script it trains in a process of its own, to be killed: `python small.py FOLDER STEPS [--resume]`.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from rom.training.data import WindowBatches
from rom.training.language import LanguageModelling
from rom.training.report import Reporter
from rom.training.trainer import Settings, Trainer


class SmallModel(nn.Module):
    """Tied weights, a buffer and dropout, because checkpoints must get all three right."""

    def __init__(self, width=16):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, input_ids, labels=None):
        hidden = F.dropout(self.embedding(input_ids), 0.1, self.training)
        logits = self.head(self.rnn(hidden)[0])
        if self.training:
            self.seen += input_ids.numel()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)

    def save_pretrained(self, folder):
        save_file(self.rnn.state_dict(), Path(folder, "model.safetensors"))


def text(length=4000):
    return np.frombuffer(b"".join(b"%d squared is %d. " % (i, i * i) for i in range(length))[:length], np.uint8)


def small_trainer(folder, seed=0, batch_size=4, **settings):
    torch.set_num_threads(1)  # two are slower for a model this small
    torch.manual_seed(seed)
    train, validation = text()[:3600], text()[3600:]
    task = LanguageModelling(WindowBatches(train, batch_size, 24, seed), validation, window=32, batch_size=8)
    settings = Settings(**{"learning_rate": 1e-2, "log_every": 5, **settings})
    return Trainer(SmallModel(), task, settings, Path(folder), Reporter(Path(folder), task.unit), {"seed": seed})


def same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


if __name__ == "__main__":
    trainer = small_trainer(sys.argv[1], steps=int(sys.argv[2]), save_every=3, evaluate_every=20)
    if "--resume" in sys.argv:
        trainer.resume()
    elif "--forever" in sys.argv:  # slowed down, so that there is time to kill it
        step = trainer._step
        trainer._step = lambda fraction: (time.sleep(0.01), step(fraction))
    trainer.run()
    sys.exit(130 if trainer.interrupted else 0)
