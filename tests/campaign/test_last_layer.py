import numpy as np
import pytest
import torch
from tolerance import assert_close
from torch.nn.functional import cross_entropy, normalize

import rom
from rom import campaign, faults
from rom.campaign import OUTCOMES, last_layer
from rom.campaign.last_layer import COUNTS
from rom.ops import last_layer as op
from rom.reference import last_layer as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TAILS = [
    {},
    {"scale": 14.3},
    {"scale": 2.5, "bounds": (-3.0, 4.0), "nan_to": "max"},
    {"bounds": (-3.0, 4.0), "nan_to": "zero"},
    {"bounds": (-3.0, 4.0), "nan_to": "keep"},
]
BRUTE_FORCE = 1e-6  # of a |Δloss| from two float64 losses: the kernel computes in float32


def case(images=37, classes=11, dtype=torch.float32):
    return (3 * torch.randn(images, classes)).to(dtype), torch.randint(0, classes, (images,))


def outcome(golden, faulty, label):
    """What happened to one image, straight from the definitions; `None` for |Δloss| where it is due."""
    before, after = int(golden.argmax()), int(faulty.argmax())
    losses = [cross_entropy(t.double()[None], label[None]).item() for t in (golden, faulty)]
    if not faulty.isfinite().all():
        return "due", before != after, None
    if torch.equal(golden.view(torch.uint8), faulty.view(torch.uint8)):
        name = "masked"
    elif before == after:
        name = "tolerable"
    else:
        name = "critical" if before == label else "sdc"
    return name, before != after, abs(losses[1] - losses[0])


def compare(got, expected):
    """Sums of the kernel and of the reference: the same counts, and losses row by row and bit by bit."""
    assert torch.equal(got[1], expected[1])
    error = (got[0] - expected[0]).abs() / expected[0].abs().clamp_min(1e-30)
    assert error.max() < 2e-5  # p = e^-80 has a relative error of 80 ulp


# ------------------------------------------------------------------------------------------------ brute force
def test_equals_brute_force_at_ten_thousand_random_sites():
    checked, seen = 0, set()
    for dtype in DTYPES:
        logits, labels = case(400, 10, dtype)
        logits[::7] = logits[::7].round()  # ties, and values with few bits
        sites = torch.randint(0, 10 * 8 * dtype.itemsize, (25,))
        for image in range(134):
            z, label = logits[image], labels[image]
            found = campaign.exhaustive_last_layer(z[None], label[None])  # of one image: a cell per class and bit
            for site in sites.tolist():
                k, bit = divmod(site, 8 * dtype.itemsize)
                faulty = z.clone()
                faulty[k] = reference.flipped(z[k : k + 1], bit)[0]
                name, mismatch, delta = outcome(z, faulty, label)
                assert found.counts[k, bit].tolist() == [*(int(o == name) for o in OUTCOMES), int(mismatch)]
                if delta is not None:
                    assert found.delta_loss[k, bit] == pytest.approx(delta, rel=1e-5, abs=BRUTE_FORCE)
                checked += 1
                seen.add(name)
    assert checked >= 10_000 and seen == {"tolerable", "sdc", "critical", "due"}


@pytest.mark.parametrize("normalise", [False, True], ids=["linear", "cosine"])
def test_head_inputs_equal_brute_force(normalise):
    features, weight, bias = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4)
    labels = torch.randint(0, 4, (6,))

    def model(f):
        return 3.0 * (((normalize(f, dim=-1, eps=0) if normalise else f) @ weight.T) + bias)

    options = {"bias": bias, "scale": 3.0, "normalise": normalise}
    by_input = campaign.exhaustive_head_inputs(features, weight, labels, **options)
    by_image = campaign.exhaustive_head_inputs(features, weight, labels, by="image", **options)
    loss, counts = np.zeros((6, 5, 32)), np.zeros((6, 5, 32, 6), np.int64)
    for image, j, bit in np.ndindex(6, 5, 32):
        faulty = features[image].clone()
        faulty[j] = reference.flipped(faulty[j : j + 1], bit)[0]
        name, mismatch, delta = outcome(model(features[image]), model(faulty), labels[image])
        counts[image, j, bit] = [*(o == name for o in OUTCOMES), mismatch]
        loss[image, j, bit] = delta or 0
    for found, axis in ((by_input, 0), (by_image, 1)):
        expected = counts.sum(axis)
        expected[..., 1] += expected[..., 0]  # a difference below the rounding of the sum: masked or tolerable
        got = found.counts.copy()
        got[..., 1] += got[..., 0]
        assert np.array_equal(got[..., 1:], expected[..., 1:])
        np.testing.assert_allclose(found.delta_loss, loss.sum(axis), rtol=1e-5, atol=1e-5)


def test_head_weights_equal_brute_force():
    features, weight, bias = torch.randn(9, 5), torch.randn(4, 5), torch.randn(4)
    labels = torch.randint(0, 4, (9,))
    found = campaign.exhaustive_head_weights(features, weight, labels, bias=bias, scale=2.0)
    golden = (features @ weight.T + bias) * 2
    loss, counts = np.zeros((4, 32)), np.zeros((4, 32, 6), np.int64)
    for k, j, bit in np.ndindex(4, 5, 32):
        wrong = weight.clone()
        wrong[k, j] = reference.flipped(weight[k, j : j + 1], bit)[0]
        faulty = (features @ wrong.T + bias) * 2
        for image in range(9):
            name, mismatch, delta = outcome(golden[image], faulty[image], labels[image])
            counts[k, bit] += [*(o == name for o in OUTCOMES), mismatch]
            loss[k, bit] += delta or 0
    for table in (found.counts, counts):
        table[..., 1] += table[..., 0]
    assert np.array_equal(found.counts[..., 1:], counts[..., 1:])
    np.testing.assert_allclose(found.delta_loss, loss, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bounded", [False, True], ids=["free", "bounded"])
def test_equals_a_campaign_that_injects_every_fault(bounded):
    """The engine, which runs the model once per fault, and the closed form are each other's oracle."""
    inputs, labels = torch.randn(12, 6), torch.randint(0, 4, (12,))
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    found = faults.survey(net, inputs)
    limits = found.profile([inputs])["2"] if bounded else None
    strata = [s for s in found.strata(samples=12, layers=["2"]) if s.target == faults.Target.OUTPUT]
    plan = faults.FaultPlan.exhaustive(strata)
    engine = campaign.Engine(found, plan, inputs, labels, batch_size=64, bounds=limits and {"2": limits})
    rows = engine.run(np.arange(len(plan))).reshape(12, 4, 32)
    got = campaign.exhaustive_last_layer(engine.golden.logits, labels, bounds=limits)
    for number, name in enumerate(COUNTS):
        assert np.array_equal(got.counts[..., number], rows[name].sum(0))
    np.testing.assert_allclose(got.delta_loss, rows["delta_loss"].sum(0), rtol=2e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------------ kernel and reference
@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: ",".join(f"{k}={v}" for k, v in tail.items()) or "plain")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_matches_float64(dtype, tail):
    logits, labels = case(dtype=dtype)
    logits[3] = logits[3].round()
    x, weight, bias = torch.randn(37, 3).to(dtype), torch.randn(11, 3).to(dtype), torch.randn(11)
    for rows in (False, True):
        with rom.backend("cpu"):
            flips = rom.ops.logit_flips(logits, labels, by_image=rows, **tail)
            weights = rom.ops.weight_flips(x, weight, labels, bias, by_input=rows, **tail)
        with rom.backend("reference"):
            compare(flips, rom.ops.logit_flips(logits, labels, by_image=rows, **tail))
            compare(weights, rom.ops.weight_flips(x, weight, labels, bias, by_input=rows, **tail))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (16, 1), (17, 33), (700, 3), (3, 200), (0, 4), (4, 0)], ids=str)
def test_shapes(shape):
    images, classes = shape
    logits = torch.randn(images, classes)
    labels = torch.randint(0, max(classes, 1), (images,))[: images if classes else 0]
    labels = torch.zeros(images, dtype=torch.int64) if classes == 0 else labels
    if images and not classes:
        with pytest.raises(ValueError, match="labels of 0 to -1"):
            rom.ops.logit_flips(logits, labels)
        return
    for by_image in (False, True):
        got = rom.ops.logit_flips(logits, labels, by_image=by_image)
        with rom.backend("reference"):
            expected = rom.ops.logit_flips(logits, labels, by_image=by_image)
        assert got[0].shape == ((images if by_image else classes), 32)
        if got[0].numel():
            compare(got, expected)
        assert got[1][..., :5].sum() == images * classes * 32


def test_many_images_go_through_the_workspace_in_parts(monkeypatch):
    """1000 classes: 688 images of 16 lanes fill the scratch memory; sums by image are those of the parts."""
    logits, labels = case(1500, 1000)
    whole = rom.ops.logit_flips(logits, labels, by_image=True)
    parts = [rom.ops.logit_flips(logits[i : i + 500], labels[i : i + 500], by_image=True) for i in range(0, 1500, 500)]
    assert torch.equal(whole[0], torch.cat([p[0] for p in parts]))
    by_class = rom.ops.logit_flips(logits, labels)
    assert torch.equal(by_class[1].sum((0, 1)), whole[1].sum((0, 1)))
    assert_close("loss", by_class[0].sum(0), whole[0].sum(0))


def test_non_contiguous_and_converted():
    logits, labels = case(22, 12)
    view = logits.T.contiguous().T[::2, ::3]
    labels = labels[::2] % 4
    got = rom.ops.logit_flips(view, labels)
    assert all(torch.equal(g, e) for g, e in zip(got, rom.ops.logit_flips(view.contiguous(), labels)))
    half = campaign.exhaustive_last_layer(logits, labels.repeat(2), dtype=torch.bfloat16)
    assert half.delta_loss.shape == (12, 16)


def test_deterministic_whatever_the_thread_count():
    logits, labels = case(900, 40)
    x, weight = torch.randn(900, 6), torch.randn(40, 6)
    arguments = (x, weight, x @ weight.T, labels, 1.0, -float("inf"), float("inf"), float("nan"))
    runs = []
    for threads in (1, 2, 3):  # the sums are given: torch's own product differs in its last bits with 3 threads
        torch.set_num_threads(threads)
        weights = [torch.ops.rom.weight_flips(*arguments, by_input, "cpu") for by_input in (False, True)]
        images = rom.ops.logit_flips(logits, labels, by_image=True)
        runs.append((*rom.ops.logit_flips(logits, labels), *images, *weights[0], *weights[1]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("spread", [1e-30, 30.0, 300.0, 1e30])
def test_extremes(spread):
    """Probabilities that round to 0 and 1, and differences beyond exp's range."""
    logits, labels = torch.randn(20, 5) * spread, torch.randint(0, 5, (20,))
    logits[0] = 0
    logits[1, :2] = -0.0
    got = rom.ops.logit_flips(logits, labels)
    with rom.backend("reference"):
        compare(got, rom.ops.logit_flips(logits, labels))


def test_infinite_and_nan_logits_are_due_and_never_dropped():
    found = campaign.exhaustive_last_layer(torch.tensor([[1.5, 0.25]]), torch.tensor([0]))
    assert found.counts[0, 30].tolist() == [0, 0, 0, 0, 1, 0]  # 1.5 becomes NaN: the largest, as for argmax
    assert found.rate("due")[0, 30] == 1 and found.cells.sum() == 64
    kept = campaign.exhaustive_last_layer(torch.tensor([[1.5, 0.25]]), torch.tensor([0]), bounds=(-2, 2))
    assert kept.mean()["due"] == 0 and kept.rate("masked")[0].sum() == 0


def test_the_mean_of_all_faults():
    logits, labels = case(8, 4)
    by_class = campaign.exhaustive_last_layer(logits, labels)
    by_image = campaign.exhaustive_last_layer(logits, labels, by="image")
    assert by_class.mean() == pytest.approx(by_image.mean())
    assert set(by_class.mean()) == {*COUNTS, "delta_loss"}
    assert sum(by_class.mean()[name] for name in OUTCOMES) == pytest.approx(1)
    with pytest.raises(ValueError, match="got 'loss'"):
        by_class.rate("loss")


# ------------------------------------------------------------------------------------------------ the operator
@pytest.mark.parametrize("rows", [False, True])
def test_opcheck(rows):
    logits, labels = case(5, 3)
    tail = (1.0, -float("inf"), float("inf"), float("nan"))
    torch.library.opcheck(torch.ops.rom.logit_flips.default, (logits, labels, *tail, rows, "cpu"))
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    arguments = (x, weight, x @ weight.T, labels, *tail, rows, "cpu")
    torch.library.opcheck(torch.ops.rom.weight_flips.default, arguments)


def test_float64_runs_on_the_reference():
    logits, labels = case(5, 3, torch.float64)
    with rom.backend("reference"):
        loss, counts = rom.ops.logit_flips(logits.requires_grad_(), labels)
    assert loss.shape == (3, 64) and not loss.requires_grad and counts[..., :5].sum() == 5 * 3 * 64


LOGITS, LABELS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rom.ops.logit_flips(LOGITS[0], LABELS), ValueError, r"logits of shape \[B, C\], got \(3,\)"),
        (lambda: rom.ops.logit_flips(LOGITS.int(), LABELS), TypeError, "logits of dtype float32"),
        (lambda: rom.ops.logit_flips(LOGITS, LABELS.int()), TypeError, "labels of dtype int64"),
        (lambda: rom.ops.logit_flips(LOGITS, LABELS[:3]), ValueError, r"labels of shape \(4,\), got \(3,\)"),
        (lambda: rom.ops.logit_flips(LOGITS, LABELS + 3), ValueError, "labels of 0 to 2, got 3 to 3"),
        (lambda: rom.ops.logit_flips(LOGITS, LABELS, scale=0.0), ValueError, "finite scale other than 0, got 0.0"),
        (lambda: rom.ops.logit_flips(LOGITS, LABELS, bounds=(1, 0)), ValueError, r"low ≤ high, got \(1, 0\)"),
        (lambda: rom.ops.logit_flips(LOGITS, LABELS, nan_to="min"), ValueError, "max, zero, keep, got 'min'"),
        (lambda: rom.ops.logit_flips(LOGITS / 0, LABELS), ValueError, "finite without a fault.*image 0"),
        (lambda: rom.ops.weight_flips(LOGITS, LOGITS.half(), LABELS), TypeError, "features of dtype torch.float16"),
        (lambda: rom.ops.weight_flips(LOGITS, LOGITS[:, :2], LABELS), ValueError, r"features of shape \(4, 2\)"),
        (lambda: campaign.exhaustive_last_layer(LOGITS, LABELS, by="bit"), ValueError, "class, image, got 'bit'"),
        (lambda: campaign.exhaustive_head_weights(LOGITS, LOGITS, LABELS, by="image"), ValueError, "class, input"),
        (lambda: campaign.exhaustive_head_inputs(LOGITS, LOGITS[:, :2], LABELS), ValueError, r"weight \[C, E\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_docstring_examples(run_doctests):
    run_doctests(op)
    run_doctests(last_layer)
