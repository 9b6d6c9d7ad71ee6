"""FedFD over Flower: the same federation, its clients in other processes or on other machines.

Flower is transport and nothing else. A client trains by `train_client`, the server averages and distils by
`Federation.finish_round`, and random numbers depend on (seed, round, client): the result is the in-process engine's,
bit for bit on the same machine and number of threads. `FedFD` and `client_app` serve Flower's simulation (`simulate`)
and, as `server_app` and `client_app_digits`, a deployment; examples/flower runs one.

Flower's FedAvg is not the base: it refuses replies that differ between clients, and ours have different architectures.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Strategy
except ImportError as error:
    raise ImportError(
        f"Flower is not installed ({error}). Run `pip install 'rom-kernels[fed]'` with Python 3.11 or newer."
    ) from error

from rom.models.fedfd.aggregation import State, Update
from rom.models.fedfd.clients import Group
from rom.models.fedfd.data import Images, digits, dirichlet_partition, split
from rom.models.fedfd.distillation import METHODS, Distillation
from rom.models.fedfd.federation import Federation, Settings, train_client

LOGGER = logging.getLogger("rom.fedfd")

#: A client's data, from the settings and the client's number; it is called where the client runs.
Load = Callable[[Settings, int], Images]
AfterRound = Callable[[dict[str, Any]], None]


# ---------------------------------------------------------------------------------------------------- the client
def client_app(load: Load, threads: int | None = None) -> ClientApp:
    """The client's side: says which client it is (its node's `partition-id`), and trains when asked to.

    threads: torch's number of threads while training; None leaves it as it is.
    """
    app = ClientApp()

    @app.query()
    def identity(message: Message, context: Context) -> Message:
        number = MetricRecord({"client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"identity": number}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if threads is not None:
            torch.set_num_threads(threads)
        task = json.loads(str(message.content.config_records["task"]["json"]))
        settings, client = Settings.from_json(task["settings"]), int(context.node_config["partition-id"])
        model = settings.group(client).build(task["image_shape"], task["num_classes"])
        state = message.content.array_records["arrays"].to_torch_state_dict()
        update = train_client(model, state, load(settings, client), settings, task["round"], client)
        arrays, metrics = ArrayRecord(dict(update.state)), MetricRecord({"examples": update.examples})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


@functools.lru_cache(maxsize=1)
def _digits(seed: int) -> Images:
    return split(digits(), seed).train


def load_digits(settings: Settings, client: int) -> Images:
    """A client's share of scikit-learn's digits: the one that the in-process engine gives it."""
    train = _digits(settings.seed)
    return train[dirichlet_partition(train.labels, settings.clients, settings.alpha, settings.seed)[client]]


# ---------------------------------------------------------------------------------------------------- the server
def pack(families: Mapping[str, State]) -> ArrayRecord:
    """All architectures in one record, its keys `architecture/tensor`."""
    return ArrayRecord({f"{a}/{name}": tensor for a, state in families.items() for name, tensor in state.items()})


def unpack(arrays: ArrayRecord) -> dict[str, dict[str, torch.Tensor]]:
    """The inverse of `pack`."""
    families: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in arrays.to_torch_state_dict().items():
        architecture, _, name = key.partition("/")
        families.setdefault(architecture, {})[name] = tensor
    return families


def _integer(reply: Message, record: str, key: str) -> int:
    value = reply.content.metric_records[record][key]
    if not isinstance(value, int):
        raise TypeError(f"expected {key} to be an integer, got {value!r}.")
    return value


class FedFD(Strategy):
    """A `Federation` as a Flower strategy: sends every client its group's model, and ends rounds with what came back.

    A client that is not connected, fails, answers late or with something unusable is left out; the round's record and
    the log of `rom.fedfd` say why.

    Args:
        federation: holds the server's state; its settings decide who trains.
        after_round: called with every round's record, after it was appended to the federation's history.
        patience: seconds that the first round waits for all its clients to connect.
    """

    def __init__(
        self, federation: Federation, after_round: AfterRound = lambda record: None, patience: float = 60.0
    ) -> None:
        self.federation, self.after_round, self.patience = federation, after_round, patience
        self._clients: dict[int, int] = {}  # node → client, of all nodes that ever said who they are
        self._asked: dict[int, int] = {}  # node → client, of this round
        self._refused: dict[int, str] = {}

    def run(self, grid: Grid) -> None:
        """The rounds that are left, over the nodes of the grid."""
        settings = self.federation.settings
        late_after = math.inf if settings.late_after is None else settings.late_after
        left = settings.rounds - self.federation.round
        self.start(grid, pack(self.federation.families), num_rounds=left, timeout=late_after)

    def summary(self) -> None:
        """Logs what is run."""
        groups = ", ".join(group.name for group in self.federation.settings.groups)
        LOGGER.info("FedFD: %d clients of groups %s", self.federation.settings.clients, groups)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """A message to every selected client that is connected, with its group's model out of `arrays`."""
        federation = self.federation
        federation.families = unpack(arrays)
        selected = federation.selected()
        nodes = self._connected(grid, selected)
        self._refused = {client: "not connected" for client in selected if client not in nodes}
        self._asked = {nodes[client]: client for client in selected if client in nodes}
        return [self._request(node, client) for node, client in self._asked.items()]

    def _request(self, node: int, client: int) -> Message:
        federation = self.federation
        task = {
            "settings": federation.settings.to_json(),
            "round": federation.round,
            "image_shape": federation.split.image_shape,
            "num_classes": federation.split.num_classes,
        }
        state = ArrayRecord(federation.state(federation.settings.group(client)))
        records = RecordDict({"arrays": state, "task": ConfigRecord({"json": json.dumps(task)})})
        return Message(records, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(federation.round))

    def _connected(self, grid: Grid, wanted: Iterable[int]) -> dict[int, int]:
        """client → node of those that are connected; nodes nobody knows yet are asked who they are."""
        end, waits = time.monotonic() + self.patience, not self._clients
        while True:
            online = set(grid.get_node_ids())
            questions = [
                Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY)
                for node in sorted(online - set(self._clients))
            ]
            for reply in grid.send_and_receive(questions, timeout=self.patience) if questions else ():
                node = reply.metadata.src_node_id
                if reply.has_error():
                    LOGGER.warning("node %d does not say which client it is: %s", node, reply.error.reason)
                else:
                    self._clients[node] = _integer(reply, "identity", "client")
            nodes = {client: node for node, client in self._clients.items() if node in online}
            if not waits or set(wanted) <= set(nodes) or time.monotonic() > end:
                return nodes
            time.sleep(1.0)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`Federation.finish_round` with the replies; the new models, and the accuracy of each group's."""
        updates, refused, silent = [], dict(self._refused), dict(self._asked)
        for reply in replies:
            client = silent.pop(reply.metadata.src_node_id, None)
            if client is None:
                LOGGER.warning("an answer of a node that was not asked: %d", reply.metadata.src_node_id)
            elif reply.has_error():
                refused[client] = f"failed: {reply.error.reason}"
            else:
                try:
                    updates.append(self._update(client, reply))
                except Exception as error:  # whatever a client sends, the round goes on
                    refused[client] = f"unreadable answer: {type(error).__name__}: {error}"
        refused |= {client: f"late: no answer in {self.federation.settings.late_after} s" for client in silent.values()}
        record = self.federation.finish_round(updates, refused)
        self.after_round(record)
        return pack(self.federation.families), MetricRecord(dict(record["accuracy"]))

    def _update(self, client: int, reply: Message) -> Update:
        group, examples = self.federation.settings.group(client).name, _integer(reply, "metrics", "examples")
        return Update(client, group, examples, reply.content.array_records["arrays"].to_torch_state_dict())

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nobody: the server has test data of its own."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None


# ---------------------------------------------------------------------------------------------------- two ways to run
def _share(train: Images, parts: list[Any], settings: Settings, client: int) -> Images:
    return train[parts[client]]


def simulate(federation: Federation, after_round: AfterRound = lambda record: None) -> None:
    """Runs the federation's remaining rounds in Flower's simulation: clients in Ray processes of this machine.

    As many clients train at the same time as torch's number of threads fits into the cores. Starting Ray takes
    seconds, so this is for trying out what will be deployed, not for speed.
    """
    from flwr.simulation import run_simulation  # noqa: PLC0415 - Ray; a deployment has none

    app, threads = ServerApp(), torch.get_num_threads()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # A busy machine took over a minute to start the processes that answer.
        FedFD(federation, after_round, patience=600.0).run(grid)

    load = functools.partial(_share, federation.split.train, federation.parts)
    # Deprecated in favour of the command `flwr run`, but the only way from Python.
    run_simulation(
        app,
        client_app(load, threads),
        num_supernodes=federation.settings.clients,
        backend_config={"client_resources": {"num_cpus": threads, "num_gpus": 0.0}},
    )


server_app = ServerApp()
client_app_digits = client_app(load_digits)


@server_app.main()
def _serve(grid: Grid, context: Context) -> None:
    """Deployed: the run's configuration says what to run; it goes on from the checkpoint in `out` if there is one."""
    config = context.run_config
    settings = Settings(
        groups=tuple(Group.parse(name) for name in str(config["groups"]).split(",")),
        clients=int(config["clients"]),
        alpha=float(config["alpha"]),
        rounds=int(config["rounds"]),
        local_epochs=int(config["local-epochs"]),
        late_after=float(config["late-after"]) or None,
        distillation=Distillation(**METHODS[str(config["method"])]),  # type: ignore[arg-type]
        seed=int(config["seed"]),
    )
    federation = Federation(split(digits(), settings.seed), settings)
    checkpoint = Path(str(config["out"])) / "checkpoint.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        federation.load(checkpoint)
    FedFD(federation, lambda record: federation.save(checkpoint)).run(grid)
