"""The ablation: heads that share a trunk, faults that are counted, and averages that are those of all faults."""

import numpy as np
import pytest
import torch

from rom import faults
from rom.models import text_guided
from rom.models.fedfd import Images
from rom.models.text_guided import ablation, ablation_data


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    images = torch.randn(48, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    return Images(images, labels)


@pytest.fixture(scope="module")
def text():
    return text_guided.text_features(
        {"a": ["round"], "b": ["a line"], "c": ["a cross"]}, text_guided.hashed_encoder(16)
    )


@pytest.fixture(scope="module")
def models(data, text):
    recipe = text_guided.Recipe(epochs=4, batch_size=16, learning_rate=0.02)
    found = {head: ablation.build(head, text, seed=1, trunk="mlp", width=16) for head in ablation.HEADS}
    for model in found.values():
        text_guided.train(model, data, recipe)
    return found


@pytest.mark.parametrize("trunk", ablation.TRUNKS)
def test_heads_begin_with_one_trunk_and_share_layer_names(text, trunk):
    built = {head: ablation.build(head, text, seed=3, trunk=trunk, width=16).eval() for head in ablation.HEADS}
    linear = built["linear"].state_dict()
    shared = [name for name in linear if name.startswith("backbone.")]
    for model in built.values():
        assert all(torch.equal(model.state_dict()[name], linear[name]) for name in shared)
        assert "head.weight" in model.state_dict() and model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    same = torch.nn.functional.normalize(text.table, dim=1)
    for head, equal in (("cosine, text", True), ("no norm, text", True), ("cosine, shuffled text", False)):
        assert torch.equal(built[head].head.weight, same) == equal
    assert built["no norm, random"].logit_scale is None and built["cosine, random"].logit_scale is not None


def test_last_layer_is_exhaustive_and_others_are_samples(models, data):
    found = ablation.damage(models["cosine, text"], data, data[np.arange(8)], 200, seed=0)
    assert [(d.layer, d.clamp) for d in found[-2:]] == [("head", "none"), ("head", "profiled")]
    assert found[-1].faults == 8 * 3 * 32
    assert {d.faults for d in found[:-2]} == {200}
    for d in found:
        assert 0 <= d.due <= d.mismatch <= 1 and d.delta_loss >= 0 and len(d.by_bit) == 32
        assert np.mean(d.by_bit) == pytest.approx(d.mismatch) or d.layer != "head"


@pytest.mark.parametrize("clamp", ablation.CLAMPS)
def test_last_layer_is_every_flip_by_hand(models, data, clamp):
    """The linear head: flip each logit's bits with numpy and evaluate."""
    model, few = models["linear"], data[np.arange(6)]
    with torch.no_grad():
        logits, seen = model(few.images).numpy(), model(data.images).abs().max().item()
    bound = seen if clamp == "profiled" else None
    golden = restricted(logits, bound)
    base = losses(golden, few.labels.numpy())
    changes, wrong, due = [], [], []
    for sample in range(6):
        for k in range(3):
            for bit in range(32):
                row = logits[sample].copy()
                row.view(np.uint32)[k] ^= np.uint32(1) << np.uint32(bit)
                row = restricted(row[None], bound)
                bad = not np.isfinite(row).all()
                due.append(bad)
                wrong.append(bad or row.argmax() != golden[sample].argmax())
                if not bad:
                    changes.append(abs(losses(row, few.labels[sample : sample + 1].numpy())[0] - base[sample]))
    found = next(d for d in ablation.damage(model, data, few, 50, seed=0) if (d.layer, d.clamp) == ("head", clamp))
    assert found.bound == pytest.approx(seen, rel=1e-6)
    assert found.due == pytest.approx(np.mean(due)) and found.mismatch == pytest.approx(np.mean(wrong))
    assert found.delta_loss == pytest.approx(np.mean(changes), rel=1e-5)
    assert (clamp == "none") == (found.due > 0)


def restricted(values, bound):
    return values if bound is None else np.where(np.isnan(values), bound, values.clip(-bound, bound)).astype("f4")


def losses(logits, labels):
    z = logits.astype(np.float64)
    top = z.max(1, keepdims=True)
    return (top[:, 0] + np.log(np.exp(z - top).sum(1))) - z[np.arange(len(z)), labels]


def test_sampled_layers_agree_with_all_their_faults(models, data):
    """Weighted strata: the estimate from a part lies near the value of the whole population."""
    few = data[np.arange(2)]
    model = models["linear"]
    layer = "backbone.features.2.0"
    population = 2 * 16 * 32
    whole, part = (
        {d.clamp: d for d in ablation.damage(model, data, few, n, seed=1) if d.layer == layer}
        for n in (10 * population, population // 4)
    )
    for clamp in ablation.CLAMPS:
        assert whole[clamp].faults == population and part[clamp].faults < population / 2
        assert part[clamp].mismatch == pytest.approx(whole[clamp].mismatch, abs=0.04)


def test_shared_layers_have_the_same_faults(models, data):
    plans = []
    for head in ("linear", "cosine, text"):
        found = faults.survey(models[head], data.images[:2])
        plans.append(faults.FaultPlan.stratified(found.strata(48, layers=["backbone.features.1.0"]), [100], seed=3))
    assert (plans[0][:].sites == plans[1][:].sites).all()


def test_all_heads_are_scored_on_the_same_images(models, data, text):
    models = {head: models[head] for head in ("linear", "cosine, random", "no norm, text")}
    record = ablation.measure(models, data, data, 20, seed=0)
    correct = torch.stack([ablation.answers(model, data)[2] for model in models.values()]).all(0)
    assert {r["images"] for r in record.values()} == {int(correct.sum())} and 0 < correct.sum() <= len(data)
    assert list(record)[:2] == ["linear", ablation.RESCALED]
    for head, r in record.items():
        assert 0 < r["top2_difference"] <= 1 and r["accuracy"] >= correct.double().mean().item()
        assert r["scale"] == 1 or head not in ("linear", "no norm, text")
    blind = models | {"cosine, random": ablation.build("cosine, random", text, 0, "mlp", width=16).eval()}
    torch.nn.init.zeros_(blind["cosine, random"].head.weight)
    with pytest.raises(ValueError, match=r"cosine, random: 0\.\d+.*Lower the learning rate"):
        ablation.measure(blind, data[data.labels.numpy() > 0], data[data.labels.numpy() > 0], 20, seed=0)


def test_rescaled_is_the_same_function(models, data):
    linear = models["linear"]
    largest = linear(data.images).abs().max().item()
    rescaled = ablation.Rescaled(linear, largest).eval()
    assert torch.equal(rescaled(data.images), linear(data.images))
    assert 1 <= rescaled.head(rescaled.backbone(data.images)).abs().max() < 2


@pytest.mark.parametrize("name", ablation_data.DATA)
def test_data_are_split_and_their_text_is_of_their_classes(name):
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
    study = ablation_data.DATA[name](seed=1, test=0.2, width=64)
    classes = len(study.text.table)
    assert study.text.table.shape[1] == 64 and len(study.test) == 359
    for part in (study.train, study.test):
        assert part.labels.min() >= 0 and part.labels.max() < classes and len(part.images) == len(part.labels)
    unit = torch.nn.functional.normalize(study.text.table, dim=1)
    assert (unit @ unit.mT - torch.eye(classes)).max() < 0.95  # no two classes have one text
    seen = {image.numpy().tobytes() for image in study.train.images}
    assert not seen & {image.numpy().tobytes() for image in study.test.images}


def test_pairs_are_read_from_left_to_right():
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
    study = ablation_data.DATA["pairs"](seed=0, test=0.2, width=64)
    single = ablation_data.DATA["digits"](seed=0, test=0.2, width=32)
    label = {image.numpy().tobytes(): int(y) for image, y in zip(single.test.images, single.test.labels)}
    for image, y in zip(study.test.images, study.test.labels):
        left, right = (half.contiguous().numpy().tobytes() for half in image.split(8, 2))
        assert int(y) == 10 * label[left] + label[right]
    rows = torch.nn.functional.normalize(single.text.table, dim=1)
    assert torch.equal(study.text.table[37], torch.cat([rows[3], rows[7]]))
