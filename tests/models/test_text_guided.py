"""The text-guided classifier: its head against the formula in float64, its tables, its checkpoints, its training."""

import argparse
import copy
import sys
import types

import pytest
import torch
from tolerance import assert_close
from torch import nn
from torch.nn import functional as F

from rom.models import TextGuidedClassifier, text_guided
from rom.models.fedfd import Images
from rom.models.text_guided import classifier, encoders, features, recipe
from rom.models.text_guided.digit_descriptions import DIGITS, QUESTIONS

MODULES = (classifier, encoders, features, recipe)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples(module, run_doctests, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "folder", tmp_path, raising=False)
    run_doctests(module)


def table(classes=7, width=16):
    return torch.randn(classes, width) * torch.rand(classes, 1) * 9


def unit(rows):
    """Rows of length 1, in float64."""
    rows = rows.double()
    return rows / rows.pow(2).sum(1, keepdim=True).sqrt()


# ------------------------------------------------------------------------------------------------ the head
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_head_is_the_formula(dtype):
    rows, f = table(), torch.randn(5, 16)
    model = TextGuidedClassifier(nn.Identity(), rows).to(dtype)
    got = model(f.to(dtype))
    assert got.dtype == dtype
    scale, weight = model.logit_scale.double().exp(), model.head.weight.double()
    # Four roundings in a row: norm, quotient, product, scale.
    assert_close("logits", got, scale * unit(f.to(dtype)) @ weight.mT, scale=4)
    first = TextGuidedClassifier(nn.Identity(), rows)
    assert_close("initial logits", first(f), (unit(f) @ unit(rows).mT) / 0.07)


def test_gradients_are_the_formulas():
    model = TextGuidedClassifier(nn.Identity(), table(), eps=0.0).double()
    f = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    values = (f, model.head.weight, model.logit_scale)

    def run(f, weight, scale):
        parameters = {"head.weight": weight, "logit_scale": scale}
        return torch.func.functional_call(model, parameters, (f,))

    assert torch.autograd.gradcheck(run, values)


def test_state_dict_is_the_released_one():
    model = TextGuidedClassifier(nn.Linear(4, 16), table())
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == {
        "logit_scale": [],
        "backbone.weight": [16, 4],
        "backbone.bias": [16],
        "head.weight": [7, 16],
    }
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert torch.allclose(model.head.weight.norm(dim=1), torch.ones(7))


def test_projection_is_appended():
    model = TextGuidedClassifier(nn.Flatten(), table(), features=12)
    images = torch.randn(2, 3, 4)
    assert_close(
        "projection", model.embed(images), F.normalize(model.backbone.projection(images.flatten(1)).double(), dim=1)
    )
    with pytest.raises(ValueError, match=r"output \[batch, 16\].*got \[2, 12\].*features=WIDTH"):
        TextGuidedClassifier(nn.Flatten(), table())(images)


def test_zero_features_are_nan_as_released_and_finite_with_eps():
    images = torch.cat([torch.zeros(1, 16), torch.ones(1, 16)])
    released = TextGuidedClassifier(nn.Identity(), table())(images)
    assert released[0].isnan().all() and released[1].isfinite().all()
    safe = TextGuidedClassifier(nn.Identity(), table(), eps=1e-6)(images)
    assert (safe[0] == 0).all() and safe[1].isfinite().all()


def test_without_norm():
    rows, f = table(), torch.randn(3, 16)
    model = TextGuidedClassifier(nn.Identity(), rows, normalize=False)
    assert_close("logits", model(f), f.double() @ F.normalize(rows.double(), dim=1).mT)
    assert set(model.state_dict()) == {"head.weight"}


def test_descriptions_are_averaged():
    many = torch.randn(7, 5, 16)
    expected = F.normalize(many.double().mean(1), dim=1)
    assert_close("rows", TextGuidedClassifier(nn.Identity(), many).head.weight, expected)


@pytest.mark.parametrize("part", ["backbone", "head", "logit_scale"])
def test_frozen_parts_do_not_move(part):
    data = Images(torch.randn(40, 1, 4, 4), torch.arange(40) % 7)
    model = TextGuidedClassifier(nn.Flatten(), table(), features=16, freeze=[part])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    text_guided.train(model, data, text_guided.Recipe(epochs=1, batch_size=20))
    moved = {name.partition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"backbone", "head", "logit_scale"} - {part}
    model.freeze(())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="parts of backbone, head, logit_scale, got tail"):
        model.freeze(["tail"])


@pytest.mark.parametrize(
    "rows, message",
    [
        (torch.randn(7), r"got torch.float32 \[7\]"),
        (torch.ones(7, 16).long(), "floating"),
        (torch.zeros(7, 0), r"\[7, 0\]"),
        (torch.cat([torch.ones(2, 16), torch.zeros(1, 16)]), "length 0.0 in row 2"),
        (torch.full((2, 16), float("nan")), "length nan in row 0"),
    ],
)
def test_tables_that_cannot_be_heads(rows, message):
    with pytest.raises(ValueError, match=message):
        TextGuidedClassifier(nn.Identity(), rows)


def test_names_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        TextGuidedClassifier("resnet18", 10)


def test_torchvision_names(monkeypatch):
    asked = []
    package = types.ModuleType("torchvision")
    package.models = types.SimpleNamespace(
        get_model=lambda name, weights, num_classes: asked.append((name, weights)) or nn.Linear(8, num_classes)
    )
    monkeypatch.setitem(sys.modules, "torchvision", package)
    model = TextGuidedClassifier("resnet18", 10)
    assert asked == [("resnet18", None)] and model(torch.randn(2, 8)).shape == (2, 10)
    assert model.backbone.out_features == 512 and "no text" in repr(model)


def test_compiles_and_exports():
    model = TextGuidedClassifier(nn.Linear(8, 16), table())
    f = torch.randn(3, 8)
    exported = torch.export.export(model, (f,)).module()
    assert torch.equal(exported(f), model(f))


# ------------------------------------------------------------------------------------------------ tables
def test_random_tables_are_orthonormal_and_seeded():
    few, many = text_guided.random_text_features(10, 64), text_guided.random_text_features(100, 8)
    assert torch.allclose(few.table @ few.table.mT, torch.eye(10), atol=1e-6)
    assert torch.allclose(many.table.norm(dim=1), torch.ones(100))
    assert torch.equal(few.table, text_guided.random_text_features(10, 64).table)
    assert not torch.equal(few.table, text_guided.random_text_features(10, 64, seed=1).table)
    assert few.source == "no text: random orthonormal, seed 0"


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_shuffling_leaves_no_row_in_place(classes):
    found = text_guided.TextFeatures(table(classes), "somewhere")
    for seed in range(20):
        mixed = text_guided.shuffled(found, seed)
        assert not (mixed.table == found.table).all(1).any()
        assert torch.equal(mixed.table.sort(0).values, found.table.sort(0).values)
    assert mixed.source == "somewhere, shuffled with seed 19"


def test_files_of_text_features(tmp_path):
    path, rows = tmp_path / "gpt3.pth", table()
    text_guided.save_text_features(path, rows)
    found = text_guided.load_text_features(path, classes=7, width=16)
    assert torch.equal(found.table, rows) and found.source == "file gpt3.pth"
    torch.save(nn.Parameter(rows.half()), path)  # CLIP on a GPU answers in half precision
    assert text_guided.load_text_features(path).table.dtype == torch.float32
    with pytest.raises(ValueError, match="expected 10 classes, got 7"):
        text_guided.load_text_features(path, classes=10)
    with pytest.raises(ValueError, match="expected 512 width, got 16"):
        text_guided.load_text_features(path, width=512)


def test_files_that_are_no_text_features(tmp_path):
    path = tmp_path / "features.pth"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        text_guided.load_text_features(path)
    torch.save(table(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged, truncated"):
        text_guided.load_text_features(path)
    torch.save({"weight": table()}, path)
    with pytest.raises(ValueError, match=r"one tensor .* got a dictionary of 'weight'"):
        text_guided.load_text_features(path)
    torch.save(torch.randn(3), path)
    with pytest.raises(ValueError, match=r"\[3\]"):
        text_guided.load_text_features(path)
    torch.save(_Trap(path.with_suffix(".ran")), path)
    with pytest.raises(ValueError, match="no file of a tensor"):
        text_guided.load_text_features(path)
    assert not path.with_suffix(".ran").exists()


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


# ------------------------------------------------------------------------------------------------ encoders
def test_digits_are_described_alike():
    assert list(DIGITS) == ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for name, texts in DIGITS.items():
        assert len(texts) == len(QUESTIONS), name
        words = " ".join(texts).lower().split()
        others = set(DIGITS) - {"one", "two", name}  # "one stroke", "two holes" are counts
        assert not others & set(words), name


def test_hashed_text_is_alike_where_words_are():
    encoder = text_guided.hashed_encoder(256)
    texts = ["a closed round ring", "a ring, round and closed", "a slanted stroke to the left"]
    rows = encoder(texts)
    cosines = rows @ rows.mT
    assert torch.allclose(cosines.diagonal(), torch.ones(3, dtype=torch.float64))
    assert cosines[0, 1] > 0.5 > cosines[0, 2]
    assert torch.equal(rows, encoder(texts))


def test_mean_over_descriptions_of_uneven_number():
    def encoder(texts):
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    found = text_guided.text_features({"a": ["12", "1234"], "b": ["123456"]}, encoder, source="lengths")
    assert found.table.tolist() == [[3, 1], [6, 1]] and found.source == "lengths"
    with pytest.raises(ValueError, match="none for 'b'"):
        text_guided.text_features({"a": ["1"], "b": []}, encoder)
    with pytest.raises(ValueError, match=r"expected \[1, width\] of the encoder, got \[3\]"):
        text_guided.text_features({"a": ["1"]}, lambda texts: torch.ones(3))


ENCODERS = {
    "open_clip": (text_guided.open_clip_encoder, "open_clip_torch"),
    "clip": (text_guided.clip_encoder, "openai/CLIP"),
    "sentence_transformers": (text_guided.sentence_encoder, "sentence-transformers"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_missing_packages_are_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    build, install = ENCODERS[name]
    with pytest.raises(ImportError, match=f"pip install .*{install}"):
        build()


@pytest.mark.parametrize("name", ENCODERS)
def test_other_packages_encoders(name, monkeypatch):
    """Against stand-ins with the packages' calls: neither they nor their weights are on every machine."""

    class Model(nn.Module):
        def encode_text(self, tokens):
            return tokens.half()

        def encode(self, texts, convert_to_tensor):
            assert convert_to_tensor
            return tokenize(texts)

    def tokenize(texts, truncate=True):
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    package = types.ModuleType(name)
    package.create_model_and_transforms = lambda name, pretrained: (Model(), None, None)
    package.get_tokenizer = lambda name: tokenize
    package.load = lambda name, device: (Model(), None)
    package.tokenize = tokenize
    package.SentenceTransformer = lambda name: Model()
    monkeypatch.setitem(sys.modules, name, package)
    found = text_guided.text_features({"a": ["12", "1234"], "b": ["1"]}, ENCODERS[name][0]())
    assert found.table.tolist() == [[3, 1], [1, 1]] and found.table.dtype == torch.float32
    assert found.source.startswith(name.replace("_t", "-t"))


# ------------------------------------------------------------------------------------------------ checkpoints
def backbone():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16))


@pytest.fixture
def released(tmp_path):
    """A file as the released script writes it, and the model in it."""
    model = TextGuidedClassifier(backbone(), table())
    averages = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        averages.module.head.weight.mul_(2)
    path = tmp_path / "checkpoint.pth"
    content = {
        "model": model.state_dict(),
        "optimizer": text_guided.RELEASED["resnet"].build_optimizer(model).state_dict(),
        "epoch": 89,
        "args": argparse.Namespace(model="resnet50", lr=0.1, embed_size=512, resume=None),
        "model_ema": averages.state_dict(),
    }
    torch.save(content, path)
    return path, model


def test_released_checkpoints(released):
    path, model = released
    again = TextGuidedClassifier(backbone(), table())
    text_guided.load_checkpoint(again, path)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    found = TextGuidedClassifier.from_checkpoint(backbone(), path)
    assert torch.equal(found.head.weight, model.head.weight) and "checkpoint" in found.text_source
    averaged = TextGuidedClassifier.from_checkpoint(backbone(), path, ema=True)
    assert torch.equal(averaged.head.weight, 2 * model.head.weight)


def test_bare_and_distributed_state_dicts(released, tmp_path):
    _, model = released
    path = tmp_path / "weights.pth"
    torch.save({f"module.{name}": t for name, t in model.state_dict().items()}, path)
    assert set(text_guided.read_checkpoint(path)) == set(model.state_dict())
    torch.save(model.state_dict(), path)
    assert set(text_guided.read_checkpoint(path)) == set(model.state_dict())
    with pytest.raises(ValueError, match="no 'model_ema'"):
        text_guided.read_checkpoint(path, ema=True)


def test_checkpoints_of_another_model_change_nothing(released, tmp_path):
    path, _ = released
    other = TextGuidedClassifier(nn.Linear(4, 16), table(classes=9))
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError) as error:
        text_guided.load_checkpoint(other, path)
    for line in (
        "differences",
        "backbone.weight: missing in the file",
        "backbone.1.running_mean: unknown to the model",
        "head.weight: [7, 16] in the file, [9, 16] in the model",
    ):
        assert line in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_damaged_and_foreign_checkpoints(released, tmp_path):
    path, model = released
    with pytest.raises(FileNotFoundError):
        text_guided.read_checkpoint(tmp_path / "nothing.pth")
    foreign = tmp_path / "foreign.pth"
    foreign.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="damaged, truncated"):
        text_guided.load_checkpoint(model, foreign)
    for content, message in (([1, 2], "a state dict"), ({"model": {"head.weight": 3}}, "tensors by name")):
        torch.save(content, foreign)
        with pytest.raises(ValueError, match=message):
            text_guided.read_checkpoint(foreign)
    torch.save({"fc.weight": torch.ones(2, 3)}, foreign)
    with pytest.raises(ValueError, match=r"no head\.weight"):
        TextGuidedClassifier.from_checkpoint(backbone(), foreign)
    torch.save({"model": model.state_dict(), "args": _Trap(tmp_path / "ran")}, foreign)
    with pytest.raises(ValueError, match="no checkpoint"):
        text_guided.read_checkpoint(foreign)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("optimizer, rate", [("sgd", 0.1), ("adamw", 0.01)])
def test_training_is_seeded_and_learns(optimizer, rate):
    data = Images(torch.randn(60, 1, 4, 4), torch.arange(60) % 3)
    plan = text_guided.Recipe(epochs=6, batch_size=20, optimizer=optimizer, learning_rate=rate, schedule="cosine")
    first = TextGuidedClassifier(nn.Flatten(), text_guided.random_text_features(3, 8), features=16)
    start, seen, runs = torch.get_rng_state(), [], []
    for seed in (5, 5, 6):
        model = copy.deepcopy(first)
        losses = text_guided.train(model, data, plan, seed, lambda epoch, loss: seen.append((epoch, loss)))
        assert losses[-1] < losses[0] and not model.training
        runs.append(losses)
    assert runs[0] == runs[1] != runs[2] and [loss for _, loss in seen] == [loss for run in runs for loss in run]
    assert torch.equal(start, torch.get_rng_state())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer": "lion"}, "optimizer of sgd, adamw, got 'lion'"),
        ({"schedule": "linear"}, "schedule of step, cosine"),
        ({"epochs": 0}, "above 0"),
        ({"learning_rate": float("nan")}, "above 0"),
    ],
)
def test_recipes_that_are_none(changes, message):
    with pytest.raises(ValueError, match=message):
        text_guided.Recipe(**changes)


def test_training_that_cannot_work():
    data = Images(torch.zeros(20, 16), torch.arange(20) % 3)
    model = TextGuidedClassifier(nn.Identity(), text_guided.random_text_features(3, 16))
    with pytest.raises(ValueError, match="a batch of 720 images, got 20"):
        text_guided.train(model, data, text_guided.Recipe())
    with pytest.raises(FloatingPointError, match="loss is nan after epoch 0"):  # features are 0, so are their norms
        text_guided.train(model, data, text_guided.Recipe(epochs=2, batch_size=10))


def test_step_schedule_is_the_released_one():
    plan = text_guided.Recipe(epochs=90)
    optimizer = plan.build_optimizer(nn.Linear(2, 2))
    schedule, rates = plan.build_schedule(optimizer), []
    for _ in range(90):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[29] == 0.1 and rates[30] == pytest.approx(0.01) and rates[89] == pytest.approx(0.001)
