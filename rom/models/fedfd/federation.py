"""Rounds of federated training over clients with different architectures, in one process."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rom import files
from rom.models.fedfd import aggregation
from rom.models.fedfd.aggregation import State, Update
from rom.models.fedfd.clients import FeatureClassifier, Group
from rom.models.fedfd.data import Images, Split, dirichlet_partition
from rom.models.fedfd.distillation import Distillation, Teacher, distill, make_projection, orthogonality

LOGGER = logging.getLogger("rom.fedfd")


@dataclass(frozen=True)
class Settings:
    """What decides a federation's result, together with the data.

    Args:
        groups: the models there are; client c belongs to groups[c % len(groups)]. The first is the global model, the
            widest of its architecture.
        clients, alpha: how many, and how uneven their classes are (`dirichlet_partition`).
        rounds: to run in all.
        fraction: of the clients that train in a round (assumed: all).
        local_epochs, batch_size, learning_rate, weight_decay: of their AdamW (assumed; one rate must suit a
            convolutional network and a transformer alike, which SGD's does not).
        late_after: seconds after which a client's answer is left out; None waits.
        distillation: the server's part.
        seed: of the split over clients, the weights and all batches.
    """

    groups: tuple[Group, ...] = (Group("cnn"), Group("deep-cnn"), Group("transformer"))
    clients: int = 12
    alpha: float = 0.3
    rounds: int = 20
    fraction: float = 1.0
    local_epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    late_after: float | None = None
    distillation: Distillation = field(default_factory=Distillation)
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError: no groups, a group twice, more groups than clients, or a global model that is not the widest."""
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names) or len(names) > self.clients:
            raise ValueError(f"Settings: expected 1 to {self.clients} (clients) different groups, got {names}.")
        if any(g.architecture == self.groups[0].architecture and g.width > self.groups[0].width for g in self.groups):
            raise ValueError(f"Settings: {names[0]} is the global model and must be the widest of its architecture.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"Settings: expected 0 < fraction <= 1, got {self.fraction}.")

    def to_json(self) -> str:
        """All of it, for a checkpoint or a message to a client."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The inverse of `to_json`."""
        values = json.loads(text)
        groups = tuple(Group(**group) for group in values.pop("groups"))
        return cls(groups=groups, distillation=Distillation(**values.pop("distillation")), **values)

    def group(self, client: int) -> Group:
        """The group of a client."""
        return self.groups[client % len(self.groups)]


def generator(*tags: int) -> torch.Generator:
    """Random numbers that depend on the tags (seed, purpose, round, client) alone."""
    state = np.random.SeedSequence(tags).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


_BUILD, _SELECT, _TRAIN, _DISTILL = range(4)


def train_client(
    model: FeatureClassifier, state: State, data: Images, settings: Settings, round_number: int, client: int
) -> Update:
    """A client's part of a round: some epochs of AdamW on its own data, starting from the state it was sent."""
    model.load_state_dict(dict(state))
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )  # fused: 13 to 19 % less of a round's CPU time with these small tensors
    random = generator(settings.seed, _TRAIN, round_number, client)
    for _ in range(settings.local_epochs):
        for batch in torch.randperm(len(data), generator=random).split(settings.batch_size):
            loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Update(client, settings.group(client).name, len(data), trained)


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """The share of the images whose largest logit is their label's."""
    model.eval()
    hits = [
        (model(data.images[i : i + 512]).argmax(-1) == data.labels[i : i + 512]).sum() for i in range(0, len(data), 512)
    ]
    return float(sum(hits)) / max(len(data), 1)


class Federation:
    """The server's state, and rounds.

    >>> from rom.models import fedfd
    >>> split = fedfd.split(fedfd.digits(), seed=0)
    >>> federation = fedfd.Federation(split, fedfd.Settings(clients=3, rounds=1, local_epochs=1))
    >>> record = federation.run_round()
    >>> sorted(record["accuracy"])
    ['cnn', 'deep-cnn', 'transformer']
    """

    def __init__(self, split: Split, settings: Settings) -> None:
        self.split, self.settings = split, settings
        self.parts = dirichlet_partition(split.train.labels, settings.clients, settings.alpha, settings.seed)
        self.history: list[dict[str, Any]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(settings.seed, _BUILD).initial_seed()))
            self._models = {g.name: g.build(split.image_shape, split.num_classes) for g in settings.groups}
            widest = {g.architecture: g for g in sorted(settings.groups, key=lambda g: g.width)}
            #: architecture → state of its widest model; every group's model is a leading slice of it
            self.families = {a: copy.deepcopy(self._models[g.name].state_dict()) for a, g in widest.items()}
            student = self._models[settings.groups[0].name].feature_dim
            self.projections = nn.ModuleDict(
                {
                    self._key(group): make_projection(
                        student, self._models[group.name].feature_dim, settings.distillation
                    )
                    for group in settings.groups
                }
            )

    @staticmethod
    def _key(group: Group) -> str:
        return group.name.replace(".", "_")  # a module's name cannot hold a dot

    # ------------------------------------------------------------------------------------------------ models
    def state(self, group: Group) -> dict[str, torch.Tensor]:
        """What a client of the group is sent."""
        shapes = self._models[group.name].state_dict()
        family = self.families[group.architecture]
        return {name: aggregation.leading(family[name], shapes[name].shape).clone() for name in shapes}

    def model(self, group: Group) -> FeatureClassifier:
        """A group's model with the server's present weights."""
        model = copy.deepcopy(self._models[group.name])
        model.load_state_dict(self.state(group))
        return model

    @property
    def round(self) -> int:
        """Rounds done."""
        return len(self.history)

    # ------------------------------------------------------------------------------------------------ a round
    def selected(self) -> list[int]:
        """The clients of the coming round."""
        count = max(1, round(self.settings.fraction * self.settings.clients))
        order = torch.randperm(
            self.settings.clients, generator=generator(self.settings.seed, _SELECT, self.round)
        ).tolist()
        return sorted(order[:count])

    def client_data(self, client: int) -> Images:
        """What a client trains on; it never leaves the client."""
        return self.split.train[self.parts[client]]

    def _answers(self, refused: dict[int, str]) -> Iterator[Update]:
        for client in self.selected():
            group, start = self.settings.group(client), time.monotonic()
            try:
                model = copy.deepcopy(self._models[group.name])
                update = self.train_client(model, self.state(group), client)
            except Exception as error:
                refused[client] = f"failed: {type(error).__name__}: {error}"
                continue
            seconds = time.monotonic() - start
            if self.settings.late_after is not None and seconds > self.settings.late_after:
                refused[client] = f"late: {seconds:.1f} s"
                continue
            yield update

    def train_client(self, model: FeatureClassifier, state: State, client: int) -> Update:
        """`train_client` with this federation's data; an engine that trains elsewhere does not call it."""
        return train_client(model, state, self.client_data(client), self.settings, self.round, client)

    def run(self, after_round: Callable[[dict[str, Any]], None] = lambda record: None) -> None:
        """The rounds that are left, in this process; `after_round` is called with each one's record."""
        while self.round < self.settings.rounds:
            after_round(self.run_round())

    def run_round(self) -> dict[str, Any]:
        """Selected clients train, one after the other; then `finish_round`."""
        refused: dict[int, str] = {}
        updates = list(self._answers(refused))
        return self.finish_round(updates, refused)

    def finish_round(self, updates: Sequence[Update], refused: Mapping[int, str] | None = None) -> dict[str, Any]:
        """Averages what can be used, distils, evaluates; returns the record that it appends to `history`.

        refused: clients that are known to have failed, and why. An update of wrong names or shapes, with NaN, or from
        an unknown client joins them: it is logged and left out.
        """
        reasons, usable = dict(refused or {}), []
        for update in updates:
            group = self.settings.group(update.client)
            known = 0 <= update.client < self.settings.clients and update.group == group.name
            why = aggregation.refusal(update, self.state(group)) if known else f"unknown client of group {update.group}"
            if why:
                reasons[update.client] = why
            else:
                usable.append(update)
        for client, why in sorted(reasons.items()):
            LOGGER.warning("round %d: client %d is left out: %s", self.round, client, why)
        for architecture, before in self.families.items():
            members = [u for u in usable if self.settings.group(u.client).architecture == architecture]
            self.families[architecture] = aggregation.average(members, before)
        loss = self._distill()
        record = {
            "round": self.round,
            "accuracy": {g.name: accuracy(self.model(g), self.split.test) for g in self.settings.groups},
            "distillation_loss": loss,
            "orthogonality": orthogonality(self.projections),
            "clients": len(usable),
            "refused": {str(client): why for client, why in sorted(reasons.items())},
        }
        self.history.append(record)
        return record

    def _distill(self) -> float:
        groups, settings = self.settings.groups, self.settings
        examples = {g.name: 0 for g in groups}
        for client, part in enumerate(self.parts):
            examples[settings.group(client).name] += len(part)
        total = sum(examples.values())
        teachers = [Teacher(self._key(g), self.model(g).eval(), examples[g.name] / total) for g in groups]
        student = self.model(groups[0])
        random = generator(settings.seed, _DISTILL, self.round)
        loss = distill(student, teachers, self.projections, self.split.proxy, settings.distillation, random)
        self.families[groups[0].architecture] = {k: v.detach().clone() for k, v in student.state_dict().items()}
        return loss

    # ------------------------------------------------------------------------------------------------ storage
    def _identity(self) -> str:
        return replace(self.settings, rounds=0).to_json()  # more rounds may follow

    def save(self, path: Path) -> None:
        """Writes the server's state, complete or not at all; `load` goes on from it bit for bit."""
        from safetensors.torch import save_file  # noqa: PLC0415 - an extra

        tensors = {f"family/{a}/{name}": t for a, state in self.families.items() for name, t in state.items()}
        tensors |= {f"projection/{name}": t for name, t in self.projections.state_dict().items()}
        metadata = {"settings": self._identity(), "history": json.dumps(self.history)}
        with files.replacing(path) as partial:
            save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote.

        Raises:
            ValueError: the file is damaged, or belongs to a federation with other settings.
        """
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an extra

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or no checkpoint ({error}).") from error
        if metadata.get("settings") != self._identity():
            raise ValueError(f"{path} belongs to a federation with other settings. Use the same, or another folder.")
        for architecture, state in self.families.items():
            self.families[architecture] = {name: tensors[f"family/{architecture}/{name}"] for name in state}
        prefix = "projection/"
        self.projections.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
        self.history = json.loads(metadata["history"])


def pooled_accuracy(split: Split, settings: Settings) -> float:
    """The ceiling: the global model trained on all data in one place, for as many epochs as all rounds together."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(settings.seed, _BUILD).initial_seed()))
        model = settings.groups[0].build(split.image_shape, split.num_classes)
    for round_number in range(settings.rounds):
        train_client(model, model.state_dict(), split.train, settings, round_number, client=0)
    return accuracy(model, split.test)
