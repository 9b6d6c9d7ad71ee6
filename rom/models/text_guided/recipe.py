"""How these classifiers are trained: SGD or AdamW, steps of the learning rate, seeds; for data in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rom.models.fedfd.data import Images

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine")


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters; the defaults are the released ones of the ResNets.

    Args:
        epochs, batch_size: batch_size over all devices.
        optimizer: "sgd" or "adamw". learning_rate, momentum (SGD), weight_decay: of it. As released, weight decay
            spares nothing, not even the logit scale.
        schedule: "step" multiplies the learning rate by gamma after every step_epochs; "cosine" takes it to 0.
        label_smoothing: of the cross entropy.

    ValueError: an unknown optimizer or schedule, or a number out of range.
    """

    epochs: int = 90
    batch_size: int = 720
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "step"
    step_epochs: int = 30
    gamma: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (("optimizer", self.optimizer, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f"Recipe: expected {name} of {', '.join(known)}, got {value!r}.")
        if min(self.epochs, self.batch_size, self.step_epochs) < 1 or not self.learning_rate > 0:
            raise ValueError(f"Recipe: expected epochs, batch_size, step_epochs and learning_rate above 0, got {self}.")

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of what is trained: frozen parameters are not in it, so that no decay moves them."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.learning_rate, self.momentum, weight_decay=self.weight_decay)

    def build_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Its learning rate; one `step()` per epoch."""
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return torch.optim.lr_scheduler.StepLR(optimizer, self.step_epochs, self.gamma)


#: What the released scripts train with (four GPUs; torchvision's RandomResizedCrop and flip). The transformers' recipes
#: also need mixup, augmentation and averages, which a loop of your own brings.
RELEASED = {
    "alexnet": Recipe(learning_rate=0.01),
    "vgg": Recipe(learning_rate=0.01),
    "resnet": Recipe(),
    "mobilenet_v2": Recipe(epochs=300, learning_rate=0.045, weight_decay=4e-5, step_epochs=1, gamma=0.98),
}


def train(
    model: nn.Module,
    data: Images,
    recipe: Recipe,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> list[float]:
    """Trains in place on images in memory; returns the mean loss of every epoch, and leaves the model in `eval()`.

    seed: of the order of the images; the global random state is not touched. progress(epoch, loss) follows each epoch.
    The last, smaller batch of an epoch is left out (batch norm cannot do with one image). ValueError: fewer images than
    a batch. FloatingPointError: the loss is no longer finite.

    >>> from rom.models import text_guided
    >>> from rom.models.fedfd import Images
    >>> model = text_guided.TextGuidedClassifier(torch.nn.Flatten(), 3, features=16)
    >>> data = Images(torch.randn(60, 1, 4, 4), torch.arange(60) % 3)
    >>> losses = text_guided.train(model, data, text_guided.Recipe(epochs=5, batch_size=20))
    >>> losses[-1] < losses[0]
    True
    """
    if len(data) < recipe.batch_size:
        raise ValueError(f"train: expected at least a batch of {recipe.batch_size} images, got {len(data)}.")
    generator = torch.Generator().manual_seed(seed)
    optimizer = recipe.build_optimizer(model)
    schedule = recipe.build_schedule(optimizer)
    losses = []
    model.train()
    for epoch in range(recipe.epochs):
        total, steps = 0.0, len(data) // recipe.batch_size
        order = torch.randperm(len(data), generator=generator)
        for index in order[: steps * recipe.batch_size].split(recipe.batch_size):
            logits = model(data.images[index])
            loss = F.cross_entropy(logits, data.labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        schedule.step()
        losses.append(total / steps)
        if not torch.isfinite(torch.tensor(losses[-1])):
            raise FloatingPointError(f"train: the loss is {losses[-1]} after epoch {epoch}. Lower the learning rate.")
        progress(epoch, losses[-1])
    model.eval()
    return losses
