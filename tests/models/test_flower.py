"""FedFD over Flower: the in-process engine's result, whatever carries the messages, and clients that misbehave."""

import importlib.util
import logging
import sys
from dataclasses import replace

import pytest
import torch

from rom.models import fedfd

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed")


@pytest.fixture(scope="module")
def split():
    return fedfd.split(fedfd.digits(), seed=0)


@pytest.fixture(scope="module")
def flower():
    return pytest.importorskip("rom.models.fedfd.flower", exc_type=ImportError, reason="Flower is not installed")


def small(**changes):
    how = fedfd.Distillation(steps=3)
    groups = (fedfd.Group("mlp"), fedfd.Group("mlp", 0.5), fedfd.Group("cnn"))
    return fedfd.Settings(
        **{"groups": groups, "clients": 3, "rounds": 2, "local_epochs": 1, "distillation": how, **changes}
    )


def in_process(split, settings):
    federation = fedfd.Federation(split, settings)
    while federation.round < settings.rounds:
        federation.run_round()
    return federation


def assert_equal(ours, expected):
    assert ours.history == expected.history
    for group in expected.settings.groups:
        state = ours.state(group)
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state(group).items())
    projections = ours.projections.state_dict()
    assert all(torch.equal(t, projections[name]) for name, t in expected.projections.state_dict().items())


class Loopback:
    """Flower's grid without a network: node 100 + c runs client c's app at once; messages travel as bytes."""

    def __init__(self, app, clients, offline=(), silent=()):
        from flwr.supercore.task_identity import TaskIdentity

        # What Flower sets when it starts a server.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.app, self.clients, self.offline, self.silent = app, clients, set(offline), set(silent)

    def get_node_ids(self):
        return [100 + client for client in range(self.clients) if client not in self.offline]

    def send_and_receive(self, messages, *, timeout=None):
        return [reply for message in messages if (reply := self.answer(message)) is not None]

    def answer(self, message):
        from flwr.app import Context, Error, Message, RecordDict

        client = message.metadata.dst_node_id - 100
        if client in self.silent and message.metadata.message_type == "train":
            return None
        context = Context(1, message.metadata.dst_node_id, {"partition-id": client}, RecordDict(), {})
        try:
            return self.app(message, context)
        except Exception as error:
            return Message(Error(code=2, reason=str(error)), reply_to=message)


def over_loopback(flower, split, settings, load=None, **grid):
    federation = fedfd.Federation(split, settings)
    app = flower.client_app(load or flower.load_digits)
    flower.FedFD(federation, patience=0.0).run(Loopback(app, settings.clients, **grid))
    return federation


def test_messages_change_nothing(flower, split):
    settings = small()
    assert_equal(over_loopback(flower, split, settings), in_process(split, settings))


def test_settings_travel():
    settings = small(late_after=3.5, distillation=fedfd.Distillation(projection="linear"))
    assert fedfd.Settings.from_json(settings.to_json()) == settings


def test_one_record_holds_all_architectures(flower, split):
    federation = fedfd.Federation(split, small())
    record = flower.pack(federation.families)
    assert {key.partition("/")[0] for key in record} == {"mlp", "cnn"}
    families = flower.unpack(record)
    for architecture, state in federation.families.items():
        assert list(families[architecture]) == list(state)
        assert all(torch.equal(tensor, families[architecture][name]) for name, tensor in state.items())


def test_clients_that_misbehave_are_left_out(flower, split, caplog):
    def load(settings, client):
        data = flower.load_digits(settings, client)
        if client == 0:
            raise RuntimeError("disk on fire")
        return replace(data, images=data.images * float("nan")) if client == 1 else data

    settings = small(clients=6, rounds=1, late_after=2.0)
    with caplog.at_level(logging.WARNING, "rom.fedfd"):
        record = over_loopback(flower, split, settings, load, offline={2}, silent={3}).history[0]
    reasons = {"0": "disk on fire", "1": "NaN", "2": "not connected", "3": "late"}
    assert record["clients"] == 2 and set(record["refused"]) == set(reasons)
    assert all(why in record["refused"][client] for client, why in reasons.items())
    assert "client 3 is left out: late: no answer in 2.0 s" in caplog.text


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda content: content.pop("metrics"), "unreadable answer: KeyError"),
        (lambda content: content.pop("arrays"), "unreadable answer: KeyError"),
        (lambda content: content["arrays"].popitem(), "missing or unknown tensors"),
        (lambda content: content["metrics"].update({"examples": 0}), "0 examples"),
    ],
)
def test_damaged_answers_are_left_out(flower, split, damage, why):
    class Damaged(Loopback):
        def answer(self, message):
            reply = super().answer(message)
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 101:
                damage(reply.content)
            return reply

    federation = fedfd.Federation(split, small(rounds=1))
    flower.FedFD(federation).run(Damaged(flower.client_app(flower.load_digits), 3))
    assert why in federation.history[0]["refused"]["1"] and federation.history[0]["clients"] == 2


def test_the_server_resumes(flower, split, tmp_path):
    settings, checkpoint = small(rounds=3), tmp_path / "server.safetensors"
    first = fedfd.Federation(split, settings)
    grid = Loopback(flower.client_app(flower.load_digits), settings.clients)

    def killed(record):
        first.save(checkpoint)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flower.FedFD(first, killed).run(grid)
    second = fedfd.Federation(split, settings)
    second.load(checkpoint)
    assert second.round == 1
    flower.FedFD(second).run(grid)
    assert_equal(second, in_process(split, settings))


def test_without_flower(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.app", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "rom.models.fedfd.flower", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'rom-kernels\[fed\]'"):
        importlib.import_module("rom.models.fedfd.flower")


@pytest.mark.slow
@needs_ray
def test_simulation_equals_the_in_process_engine(flower, split):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ours = fedfd.Federation(split, small())
        flower.simulate(ours)
        assert_equal(ours, in_process(split, small()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@needs_ray
def test_simulation_goes_on_without_clients_that_misbehave(flower, split):
    federation = fedfd.Federation(split, small(rounds=1))
    images, labels = split.train.images.clone(), split.train.labels.clone()
    labels[federation.parts[0]] = 1000  # no such class: raises
    images[federation.parts[1]] = float("nan")
    federation.split = replace(split, train=fedfd.Images(images, labels))
    flower.simulate(federation)
    record = federation.history[0]
    assert record["clients"] == 1 and set(record["refused"]) == {"0", "1"}
    assert "1000" in record["refused"]["0"] and "NaN" in record["refused"]["1"]
