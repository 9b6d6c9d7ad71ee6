"""FedFD: partitions, averaging, distillation, and a server that survives its clients and its own death."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rom.models import fedfd
from rom.models.fedfd import aggregation, distillation, federation

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")

NO_DISTILLATION = fedfd.Distillation(feature_weight=0.0, logit_weight=0.0)


@pytest.fixture(scope="module")
def split():
    return fedfd.split(fedfd.digits(), seed=0)


def small(**changes):
    groups = (fedfd.Group("mlp"), fedfd.Group("cnn"))
    how = changes.pop("distillation", fedfd.Distillation(steps=3))
    return fedfd.Settings(
        **{"groups": groups, "clients": 4, "rounds": 2, "local_epochs": 1, "distillation": how, **changes}
    )


# ------------------------------------------------------------------------------------------------ data
def test_partition_covers_everything_once(split):
    parts = fedfd.dirichlet_partition(split.train.labels, 7, 0.3, seed=3)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(split.train)))
    again = fedfd.dirichlet_partition(split.train.labels, 7, 0.3, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again))


def test_small_alpha_is_uneven(split):
    def largest_share(alpha):
        parts = fedfd.dirichlet_partition(split.train.labels, 6, alpha, seed=0)
        counts = np.stack([np.bincount(split.train.labels[part], minlength=10) for part in parts])
        return (counts.max(1) / counts.sum(1)).mean()

    assert largest_share(0.1) > 0.3
    assert largest_share(1000.0) < 0.15


@pytest.mark.parametrize("clients, alpha, message", [(0, 1.0, "1 to"), (10_000, 1.0, "1 to"), (3, 0.0, "alpha > 0")])
def test_impossible_partitions(split, clients, alpha, message):
    with pytest.raises(ValueError, match=message):
        fedfd.dirichlet_partition(split.train.labels, clients, alpha, seed=0)


def test_any_dataset(split):
    pairs = [(split.train.images[i], split.train.labels[i].item()) for i in range(5)]
    images = fedfd.Images.from_dataset(pairs)
    assert (
        torch.equal(images.images, split.train.images[:5]) and images.labels.tolist() == split.train.labels[:5].tolist()
    )


# ------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("architecture", list(fedfd.ARCHITECTURES))
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_models_and_slices(architecture, width):
    full, model = (fedfd.Group(architecture, w).build((1, 8, 8), 10) for w in (1.0, width))
    images = torch.rand(3, 1, 8, 8)
    assert model.features(images).shape == (3, model.feature_dim) and model(images).shape == (3, 10)
    wide = full.state_dict()
    for name, tensor in model.state_dict().items():  # a narrower model fits into a wider one
        assert aggregation.leading(wide[name], tensor.shape).shape == tensor.shape


@pytest.mark.parametrize("text", ["lenet", "cnn@0", "cnn@2", "cnn@x", ""])
def test_unknown_groups(text):
    with pytest.raises(ValueError, match="expected ARCHITECTURE or ARCHITECTURE@WIDTH"):
        fedfd.Group.parse(text)


def test_group_names_round_trip():
    for group in (fedfd.Group("cnn"), fedfd.Group("mlp", 0.25)):
        assert fedfd.Group.parse(group.name) == group


# ------------------------------------------------------------------------------------------------ averaging
def test_average_of_equal_widths_is_fedavg():
    states = [{"w": torch.randn(3, 5)} for _ in range(3)]
    updates = [fedfd.Update(c, "mlp", n, s) for c, (n, s) in enumerate(zip((3, 1, 7), states))]
    expected = sum(n * s["w"].double() for n, s in zip((3, 1, 7), states)) / 11
    before = {"w": torch.zeros(3, 5)}
    got = aggregation.average(updates, before)["w"]
    assert torch.equal(got, expected.float())
    assert torch.equal(aggregation.average(updates[::-1], before)["w"], got)  # whoever answered first


def test_average_of_slices():
    wide = fedfd.Update(0, "mlp", 1, {"w": torch.full((2, 3), 4.0)})
    narrow = fedfd.Update(1, "mlp@0.5", 3, {"w": torch.full((1, 2), 8.0)})
    got = aggregation.average([wide, narrow], {"w": torch.zeros(2, 3)})["w"]
    assert got.tolist() == [[7.0, 7.0, 4.0], [4.0, 4.0, 4.0]]
    assert aggregation.average([narrow], {"w": torch.ones(2, 3)})["w"].tolist() == [[8.0, 8.0, 1.0], [1.0, 1.0, 1.0]]


def test_one_architecture_without_distillation_is_fedavg_bit_for_bit(split):
    settings = small(groups=(fedfd.Group("mlp"),), distillation=NO_DISTILLATION)
    ours = fedfd.Federation(split, settings)
    state, model = ours.state(settings.groups[0]), settings.groups[0].build(split.image_shape, split.num_classes)
    for number in range(settings.rounds):
        ours.run_round()
        trained, sizes = [], [len(part) for part in ours.parts]
        for client, part in enumerate(ours.parts):
            trained.append(fedfd.train_client(model, state, split.train[part], settings, number, client).state)
        state = {
            k: (sum(n * t[k].double() for n, t in zip(sizes, trained)) / sum(sizes)).to(state[k].dtype) for k in state
        }
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state(settings.groups[0]).items())


# ------------------------------------------------------------------------------------------------ distillation
@pytest.mark.parametrize("method", list(fedfd.METHODS))
def test_every_method_runs(split, method):
    how = fedfd.Distillation(**{"steps": 3, **fedfd.METHODS[method]})
    ours = fedfd.Federation(split, small(distillation=how))
    ours.run()
    assert all(record["orthogonality"] <= 1e-5 for record in ours.history) and ours.round == 2
    assert set(ours.history[-1]["accuracy"]) == {"mlp", "cnn"}
    assert all(torch.isfinite(t).all() for t in ours.state(ours.settings.groups[0]).values())
    orthogonal = [layer for layer in ours.projections.values() if hasattr(layer, "parametrizations")]
    assert len(orthogonal) == (2 if how.projection == "orthogonal" else 0)


def test_distillation_brings_the_features_together(split):
    torch.manual_seed(0)
    groups = (fedfd.Group("mlp"), fedfd.Group("cnn"))
    student, teacher = (g.build(split.image_shape, split.num_classes) for g in groups)
    how = fedfd.Distillation(steps=60, learning_rate=3e-3, logit_weight=0.0)
    projections = torch.nn.ModuleDict({"cnn": distillation.make_projection(80, 64, how)})
    teachers = [distillation.Teacher("cnn", teacher.eval(), 1.0)]

    def distance():
        with torch.no_grad():
            z, target = projections["cnn"](student.features(split.proxy)), teacher.features(split.proxy)
            return F.mse_loss(F.layer_norm(z, (64,)), F.layer_norm(target, (64,))).item()

    before, weights = distance(), {k: v.clone() for k, v in teacher.state_dict().items()}
    distillation.distill(student, teachers, projections, split.proxy, how, federation.generator(0))
    assert distance() < 0.6 * before
    assert distillation.orthogonality(projections) <= 1e-5
    assert all(torch.equal(v, weights[k]) for k, v in teacher.state_dict().items())  # teachers do not learn


@pytest.mark.parametrize("field", ["projection", "feature_loss", "normalization"])
def test_unknown_choices(field):
    with pytest.raises(ValueError, match=f"expected {field} of"):
        fedfd.Distillation(**{field: "other"})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"groups": ()}, "different groups"),
        ({"groups": (fedfd.Group("mlp"), fedfd.Group("mlp"))}, "different groups"),
        ({"clients": 1}, "1 to 1"),
        ({"groups": (fedfd.Group("mlp", 0.5), fedfd.Group("mlp"))}, "must be the widest"),
        ({"fraction": 0.0}, "0 < fraction <= 1"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


# ------------------------------------------------------------------------------------------------ what goes wrong
def test_bad_clients_are_left_out_and_the_round_goes_on(split, caplog):
    class Unlucky(fedfd.Federation):
        def train_client(self, model, state, client):
            update = super().train_client(model, state, client)
            if client == 0:
                raise RuntimeError("out of memory")
            if client == 1:
                next(iter(update.state.values()))[0] = float("nan")
            if client == 2:
                name = next(iter(update.state))
                return replace(update, state={**update.state, name: torch.zeros(3)})
            return update

    ours = Unlucky(split, small(clients=6))
    with caplog.at_level(logging.WARNING, "rom.fedfd"):
        record = ours.run_round()
    assert record["clients"] == 3 and set(record["refused"]) == {"0", "1", "2"}
    assert "out of memory" in record["refused"]["0"] and "NaN" in record["refused"]["1"]
    assert "shape (3,) instead of" in record["refused"]["2"] and "client 0 is left out" in caplog.text
    assert all(torch.isfinite(t).all() for g in ours.settings.groups for t in ours.state(g).values())


def test_late_clients_are_left_out(split):
    record = fedfd.Federation(split, small(late_after=0.0)).run_round()
    assert record["clients"] == 0 and all(why.startswith("late") for why in record["refused"].values())


def test_foreign_updates_are_left_out(split):
    ours = fedfd.Federation(split, small())
    state = ours.state(ours.settings.groups[0])
    strangers = [fedfd.Update(99, "mlp", 5, state), fedfd.Update(1, "mlp", 5, state), fedfd.Update(0, "mlp", 0, state)]
    record = ours.finish_round(strangers)
    assert record["clients"] == 0 and set(record["refused"]) == {"99", "1", "0"}


def test_a_resumed_federation_ends_where_an_uninterrupted_one_does(split, tmp_path):
    settings = small(rounds=3)
    whole = fedfd.Federation(split, settings)
    for _ in range(3):
        whole.run_round()
    first = fedfd.Federation(split, settings)
    first.run_round()
    first.save(tmp_path / "server.safetensors")
    second = fedfd.Federation(split, settings)
    second.load(tmp_path / "server.safetensors")
    assert second.round == 1
    for _ in range(2):
        second.run_round()
    assert second.history == whole.history
    for group in settings.groups:
        assert all(torch.equal(t, whole.state(group)[name]) for name, t in second.state(group).items())


def test_checkpoints_of_others_and_damaged_ones(split, tmp_path):
    path = tmp_path / "server.safetensors"
    fedfd.Federation(split, small()).save(path)
    with pytest.raises(ValueError, match="belongs to a federation with other settings"):
        fedfd.Federation(split, small(seed=1)).load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        fedfd.Federation(split, small()).load(path)


def test_example(run_doctests):
    run_doctests(federation)


@pytest.mark.slow
def test_pooled_training_is_the_ceiling(split):
    settings = fedfd.Settings(rounds=10)
    assert fedfd.pooled_accuracy(split, settings) >= 0.95
