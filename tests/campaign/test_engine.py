"""The engine against brute force: for every fault a fresh injected model and a full forward pass."""

import numpy as np
import pytest
import torch
from campaign_nets import Attentive, Skip, mlp
from torch import nn

import rom
from rom import faults
from rom.campaign import OUTCOMES, RESULT, Engine, engine, golden, outcomes
from rom.campaign.outcomes import Golden
from rom.faults import FaultPlan, Stratum, Target

N, BATCH = 21, 8
MODELS = {"mlp": (mlp, (12,)), "skip": (Skip, (3, 8, 8)), "attentive": (Attentive, (5, 6))}


class Setting:
    """A model, its survey, and data."""

    def __init__(self, name):
        torch.manual_seed(1)
        make, shape = MODELS[name]
        self.model = make().eval()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.2)
        self.x = torch.randn(N, *shape)
        with torch.no_grad():
            answers = self.model(self.x).argmax(1)
        self.labels = torch.where(torch.rand(N) < 0.7, answers, (answers + 1) % 4)
        self.found = faults.survey(self.model, self.x[:2])

    def plan(self, n, targets=tuple(Target), own_weights=False, seed=3, bits=()):
        strata = self.found.strata(N, targets, lambda layer: True, bits, own_weights=own_weights)
        return FaultPlan.stratified(strata, [min(n, stratum.size) for stratum in strata], seed)

    def engine(self, plan, **options):
        return Engine(self.found, plan, self.x, self.labels, **{"batch_size": BATCH, **options})


@pytest.fixture(scope="module", params=MODELS)
def setting(request):
    return Setting(request.param)


@pytest.fixture(scope="module")
def small():
    return Setting("mlp")


def brute_force(setting, plan, positions, **options):
    """A model injected with all of the plan, armed with one fault, over all samples in batches."""
    faulty = rom.inject(setting.found, plan, **options)
    pad = -len(setting.x) % BATCH
    inputs = torch.cat([setting.x, setting.x[-1:].expand(pad, *setting.x.shape[1:])]).split(BATCH)
    with torch.no_grad():
        faulty.arm(plan[:0])
        reference = Golden(torch.cat([faulty(x) for x in inputs])[: len(setting.x)], setting.labels)
        results = np.zeros(len(positions), RESULT)
        for result, position in zip(results, positions):
            one = plan[int(position)]
            logits, first = {}, None
            sample = one.sites["sample"][0]
            for start, x in zip(range(0, N, BATCH), inputs):
                if sample not in (faults.ALL, *range(start, start + BATCH)):
                    continue
                faulty.arm(one, first_sample=start)
                logits |= dict(enumerate(faulty(x), start))
                entry = faulty.log()[0]
                first = entry if first is None and entry["status"] == 1 else first
            samples = np.arange(N) if sample == faults.ALL else one.sites["sample"][:1].astype(int)
            cells = reference.judge(torch.stack([logits[s] for s in samples]), samples)
            for name, which in cells.outcomes.items():
                result[name] = which.sum()
            result["position"], result["stratum"], result["cells"] = position, one.stratum[0], len(samples)
            result["sample"] = samples[0] if len(samples) == 1 else -1
            result["mismatch"], result["delta_loss"] = cells.mismatch.sum(), sum(cells.delta_loss.tolist())
            result["old"], result["new"] = first["old"], first["new"]
    return results, reference


def same(got, expected):
    for name in RESULT.names:
        wrong = np.flatnonzero(got[name] != expected[name])
        assert not len(wrong), (name, got[wrong[:3]], expected[wrong[:3]])


# ------------------------------------------------------------------------------------------------ against brute force
@pytest.mark.parametrize("own_weights", [False, True])
def test_every_layer_and_target(setting, own_weights):
    plan = setting.plan(2, own_weights=own_weights)
    run = setting.engine(plan)
    expected, reference = brute_force(setting, plan, range(len(plan)))
    assert torch.equal(run.golden.logits, reference.logits)
    results = run.run(np.arange(len(plan)))
    same(results, expected)
    met = {plan.strata[h].target for h in results["stratum"]}
    assert met >= {Target.A, Target.B, Target.OUTPUT, Target.BIAS}
    assert sum(results[outcome].sum() > 0 for outcome in OUTCOMES) >= 2


@pytest.mark.parametrize("options", [{"restart": False}, {"cone": False}, {"memory": 0}], ids=str)
def test_shortcuts_change_nothing(setting, options):
    plan = setting.plan(6)
    positions = np.arange(len(plan))
    same(setting.engine(plan, **options).run(positions), setting.engine(plan).run(positions))


def test_grouping_changes_nothing(setting):
    plan = setting.plan(8)
    run = setting.engine(plan)
    whole = run.run(np.arange(len(plan)))
    order = np.random.default_rng(0).permutation(len(plan))
    same(run.run(order), whole[order])
    for size in (1, 7):
        cut = order[: 10 * size]
        same(np.concatenate([run.run(cut[i : i + size]) for i in range(0, len(cut), size)]), whole[cut])
    same(run.run([5, 5]), whole[[5, 5]])


def test_batch_sizes_differ_by_rounding_only(setting):
    plan = setting.plan(4, bits=tuple(range(21, 32)))
    first, second = (setting.engine(plan, batch_size=size).run(np.arange(len(plan))) for size in (BATCH, 16))
    moved = np.abs(first["delta_loss"] - second["delta_loss"])
    assert (moved <= 1e-4 + 1e-2 * first["delta_loss"]).all()
    for outcome in ("mismatch", "due", "critical"):
        assert abs(first[outcome].astype(int) - second[outcome]).sum() <= 1


def test_rows_that_must_keep_their_place(setting, monkeypatch):
    """As with a library that rounds by row: there are some for small batches."""
    plan = setting.plan(6)
    whole = setting.engine(plan).run(np.arange(len(plan)))
    trials = Engine._trials
    monkeypatch.setattr(Engine, "_trials", lambda self: list(trials(self))[1:])
    same(setting.engine(plan).run(np.arange(len(plan))), whole)


def test_windows_spread_as_convolutions_do():
    """Whatever the kernel, stride, padding, groups and size: what a wrong pixel reaches is recomputed, nothing else."""
    torch.manual_seed(3)
    for kernel, stride, padding, groups, size in [
        (3, 1, 1, 1, 24),
        (3, 2, 1, 2, 27),
        (1, 2, 0, 1, 24),
        (5, 1, 0, 4, 28),
        (4, 3, 2, 1, 35),
        ((3, 1), (1, 2), (1, 0), 1, 24),
    ]:
        second = nn.Conv2d(4, 4, kernel, stride, padding, groups=groups)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), second, nn.MaxPool2d(3, 2, 1), nn.ReLU())
        net.extend([nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]).eval()
        x, labels = torch.randn(9, 2, size, size), torch.zeros(9, dtype=torch.int64)
        found = faults.survey(net, x[:2])
        plan = FaultPlan.simple(found.strata(9, layers=lambda layer: True), 300, seed=0)
        runs = [Engine(found, plan, x, labels, batch_size=8, cone=cone) for cone in (True, False)]
        assert any(len(chain.segments) > 1 for chain in runs[0]._chains.values())
        same(*(run.run(np.arange(300)) for run in runs))


# ------------------------------------------------------------------------------------------------ outcomes
def test_outcomes():
    logits = torch.tensor([[3.0, 1, 0], [0, 2, 1], [1, 0, 5], [2, 1, 0]])
    reference = Golden(logits, torch.tensor([0, 1, 0, 0]))
    assert reference.accuracy == 0.75 and reference.top1.tolist() == [0, 1, 2, 0]
    assert torch.allclose(
        reference.loss, nn.functional.cross_entropy(logits.double(), reference.labels, reduction="none")
    )
    faulty = torch.tensor(
        [[3.0, 1, 0], [0, 2, 1.5], [1, 6, 5], [0, 1, 0], [float("inf"), 0, 0], [0, float("nan"), 0], [3, 1, -0.0]]
    )
    samples = np.array([0, 1, 2, 3, 0, 0, 0])
    cells = reference.judge(faulty, samples)
    got = [next(name for name in OUTCOMES if cells.outcomes[name][i]) for i in range(7)]
    assert got == ["masked", "tolerable", "sdc", "critical", "due", "due", "tolerable"]
    assert sum(which.sum() for which in cells.outcomes.values()) == 7
    assert cells.mismatch.tolist() == [False, False, True, True, False, True, False]
    losses = nn.functional.cross_entropy(faulty.double(), reference.labels[samples], reduction="none").numpy()
    expected = abs(losses - reference.loss.numpy()[samples])[[1, 2, 3]]
    assert np.allclose(cells.delta_loss, [0, *expected, 0, 0, 0])


def test_faults_that_end_in_nan(small):
    big = small.found.layer("4").extents[Target.OUTPUT]
    stratum = Stratum("4", Target.OUTPUT, big.dtype, N, big.rows, big.cols)
    masks = [faults.set_bits(0x7FC00000), faults.set_bits(0xFF800000), faults.flip(0), faults.set_bits(0x7F7FFFFF)]
    sites = np.concatenate([faults.sites(Target.OUTPUT, m, sample=i, col=0, fault_id=i) for i, m in enumerate(masks)])
    results = small.engine(FaultPlan.from_sites([stratum], 0, sites)).run(range(4))
    assert results["due"].tolist() == [1, 1, 0, 0] and results["masked"].tolist() == [0, 0, 1, 0]
    assert results["delta_loss"][:3].tolist() == [0, 0, 0]
    assert results["delta_loss"][3] > 1e38 or small.labels[3] == 0
    assert results["new"].tolist() == [0x7FC00000, 0xFF800000, results["old"][2], 0x7F7FFFFF]


def test_bounds(setting):
    bounds = setting.found.profile([setting.x[:10]])  # other samples exceed them: the golden run is restricted, too
    plan = setting.plan(1, bits=(29, 30, 31))
    for nan_to in ("max", "zero") if len(plan) < 50 else ("zero",):
        run = setting.engine(plan, bounds=bounds, nan_to=nan_to)
        expected, reference = brute_force(setting, plan, range(len(plan)), bounds=bounds, nan_to=nan_to)
        assert torch.equal(run.golden.logits, reference.logits)
        results = run.run(np.arange(len(plan)))
        same(results, expected)
    free = setting.engine(plan).run(np.arange(len(plan)))
    assert results["delta_loss"].sum() < free["delta_loss"].sum()


# ------------------------------------------------------------------------------------------------ plans
def test_rates_hit_many_places_at_once(setting):
    strata = setting.found.strata(N, (Target.OUTPUT, Target.B))
    plan = FaultPlan.rate(strata, 2e-5, seed=5, realisations=4)
    run = setting.engine(plan)
    results = run.run(range(4))
    assert (results["cells"][results["sample"] == -1] == N).all()
    faulty = rom.inject(setting.found, plan)
    inputs = torch.cat([setting.x, setting.x[-1:].expand(-N % BATCH, *setting.x.shape[1:])])
    for position in range(4):
        logits = []
        for start in range(0, N, BATCH):
            faulty.arm(plan[position], first_sample=start)
            with torch.no_grad():
                logits.append(faulty(inputs[start : start + BATCH]))
        cells = run.golden.judge(torch.cat(logits)[:N], np.arange(N))
        if results["cells"][position] == N:
            assert [results[name][position] for name in OUTCOMES] == [cells.outcomes[name].sum() for name in OUTCOMES]


def test_a_realisation_without_faults(small):
    plan = FaultPlan.rate(small.found.strata(N), 0.0, seed=5, realisations=2)
    results = small.engine(plan).run([1, 0])
    assert results["masked"].tolist() == [N, N] and results["stratum"].tolist() == [-1, -1]


def test_a_fault_of_several_words(small):
    stratum = small.found.strata(N, [Target.OUTPUT], ["2"])[0]
    sites = faults.sites(Target.OUTPUT, faults.flip(1 << 31), sample=3, col=[1, 2, 5])
    together = small.engine(FaultPlan.from_sites([stratum], 0, sites)).run([0])
    assert together["sample"] == 3 and together["cells"] == 1
    same(small.engine(FaultPlan.from_sites([stratum], 0, sites), restart=False).run([0]), together)


def test_nothing_to_do(small):
    results = small.engine(small.plan(2)).run([])
    assert results.dtype == RESULT and len(results) == 0


# ------------------------------------------------------------------------------------------------ errors
class Sums(nn.Module):
    """Mixes the samples of a batch."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.linear(x))


def test_errors(small):
    plan = small.plan(1)
    x, labels = small.x, small.labels
    for arguments, message in [
        ((x[:5], labels), r"labels of int64 \(5,\), got torch.int64 \(21,\)"),
        ((x, labels.float()), r"labels of int64 \(21,\), got torch.float32"),
        ((x[:0], labels[:0]), "at least one sample"),
        ((x[:5], labels[:5]), "the plan names 21 samples .* inputs has 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            Engine(small.found, plan, *arguments)
    with pytest.raises(ValueError, match="batch_size of at least 1"):
        small.engine(plan, batch_size=0)
    with pytest.raises(IndexError, match="positions below"):
        small.engine(plan).run([len(plan)])
    other = FaultPlan.simple([Stratum("hed", Target.OUTPUT, "float32", 3, cols=5)], 1, seed=0)
    with pytest.raises(ValueError, match="a layer of"):
        small.engine(other)
    tokens = nn.Sequential(nn.Linear(6, 5)).eval()
    found = faults.survey(tokens, torch.randn(2, 4, 6))
    with pytest.raises(ValueError, match=r"logits \[N, C\]"):
        Engine(found, FaultPlan.simple(found.strata(3), 1, seed=0), torch.randn(3, 4, 6), labels[:3])


@pytest.mark.parametrize("model", [Sums(), nn.Sequential(nn.Linear(12, 5), nn.Dropout(0.5))], ids=["mixes", "draws"])
def test_models_in_training_mode_are_refused(small, model):
    found = faults.survey(model.train(), small.x[:2])
    plan = FaultPlan.simple(found.strata(N, layers=lambda layer: layer.kind == "linear"), 5, seed=0)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        Engine(found, plan, small.x, small.labels).run(range(5))


def test_a_model_instead_of_a_survey(small):
    plan = small.plan(2)
    run = Engine(small.model, plan, small.x, small.labels, batch_size=BATCH)
    same(run.run(range(len(plan))), small.engine(plan).run(range(len(plan))))


def test_examples(run_doctests):
    run_doctests(engine)
    assert outcomes and golden
