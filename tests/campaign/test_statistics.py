import math

import numpy as np
import pytest

from rom import faults
from rom.campaign import OUTCOMES, RESULT, statistics
from rom.campaign.statistics import Estimate, Schedule, wilson
from rom.faults import Stratum, Target

INTRA = [0.1, 0.5, 0.9]  # correlation of the cells of one fault


def clusters(rng, p, correlation, n, cells):
    """Events per fault: each has a probability of its own, beta distributed, mean p."""
    share = (1 - correlation) / correlation
    return rng.binomial(cells, rng.beta(p * share, (1 - p) * share, n)).astype(float), np.full(n, float(cells))


def coverage(truth, intervals):
    return np.mean([i.low <= truth <= i.high for i in intervals])


def records(stratum, mismatch, cells=1, delta_loss=0.0):
    rows = np.zeros(len(stratum), RESULT)
    rows["stratum"], rows["mismatch"], rows["sdc"], rows["cells"] = stratum, mismatch, mismatch, cells
    rows["tolerable"], rows["delta_loss"] = rows["cells"] - mismatch, delta_loss
    return rows


def head(cols, bits=(), layer="head"):
    return Stratum(layer, Target.OUTPUT, "float32", samples=100, cols=cols, bits=bits)


# ------------------------------------------------------------------------------------------------ one proportion
def test_wilson_covers_where_wald_does_not():
    rng = np.random.default_rng(0)
    for p, wald_covers in ((0.01, 0.94), (0.002, 0.88), (0.0005, 0.45)):
        found = rng.binomial(1000, p, 3000)
        half = 1.96 * np.sqrt(found / 1000 * (1 - found / 1000) / 1000)
        assert np.mean(np.abs(found / 1000 - p) <= half) <= wald_covers
        table = {k: wilson(k, 1000) for k in set(found.tolist())}
        assert coverage(p, [table[k] for k in found.tolist()]) >= 0.90


def test_wilson_is_the_published_one():
    got = wilson(15, 148, level=0.95)  # Newcombe (1998), table I
    assert (round(got.low, 4), round(got.high, 4)) == (0.0624, 0.1605)
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == 1


def test_finite_population():
    """Drawn without replacement, n of N: covers as before, and is narrower; everything drawn leaves no doubt."""
    rng = np.random.default_rng(1)
    found = rng.hypergeometric(50, 950, 600, 2000)
    table = {k: wilson(k, 600, population=1000) for k in set(found.tolist())}
    assert 0.93 <= coverage(0.05, [table[k] for k in found.tolist()]) <= 0.985
    assert wilson(30, 600, 1000).high - 0.05 < 0.7 * (wilson(30, 600).high - 0.05)
    assert wilson(7, 100, 100) == pytest.approx((0.07, 0.07, 0.07))


def test_rule_of_three():
    assert statistics.rule_of_three(300) == pytest.approx(3 / 300, rel=0.01)
    assert statistics.rule_of_three(50, 50) == 0
    bad = math.floor(statistics.rule_of_three(60, 200) * 200)  # as many bad ones as it calls possible
    unseen = math.comb(200 - bad - 1, 60) / math.comb(200, 60)
    assert unseen <= 0.05  # one more, and seeing none is improbable


@pytest.mark.parametrize("margin, level, n", [(0.05, 0.95, 385), (0.05, 0.99, 664), (0.01, 0.95, 9604)])
def test_sample_size_is_leveugles(margin, level, n):
    assert statistics.sample_size(margin, level=level) == n
    assert statistics.sample_size(margin, 500, level) < n


# ------------------------------------------------------------------------------------------------ clusters
@pytest.mark.parametrize("correlation", INTRA)
def test_clustered_intervals_cover_where_the_naive_one_fails(correlation):
    rng = np.random.default_rng(2)
    drawn = [clusters(rng, 0.1, correlation, 200, 64) for _ in range(400)]
    assert coverage(0.1, [wilson(e.sum(), c.sum()) for e, c in drawn]) < 0.6
    assert coverage(0.1, [statistics.clustered(e, c) for e, c in drawn]) >= 0.9
    resampled = [statistics.bootstrap(e, c, resamples=300, seed=i) for i, (e, c) in enumerate(drawn)]
    assert coverage(0.1, resampled) >= 0.9


def test_clustered_at_rare_events_and_with_one_cell_each():
    rng = np.random.default_rng(3)
    drawn = [clusters(rng, 0.02, 0.9, 200, 64) for _ in range(400)]  # 4 of 200 faults do anything
    assert coverage(0.02, [statistics.clustered(e, c) for e, c in drawn]) >= 0.9
    events = (np.arange(400) < 12).astype(float)
    single, plain = statistics.clustered(events, np.ones(400)), wilson(12, 400)
    assert single == pytest.approx(plain, rel=0.01)
    nothing = statistics.clustered(np.zeros(50), np.full(50, 64.0))
    assert nothing.high == pytest.approx(wilson(0, 50).high, rel=0.05)  # 50 draws, not 3200
    assert statistics.clustered(np.zeros(1), np.ones(1)).high > 0.9


def test_faults_that_meet_unequal_numbers_of_samples():
    """A ratio of sums: faults that fail more on fewer samples must not bias it, nor its interval."""
    rng = np.random.default_rng(4)
    covered = []
    for seed in range(300):
        large = rng.random(200) < 0.5
        cells = np.where(large, 40.0, 4.0)
        events = np.where(large, 0.05, 0.6) * cells
        covered += [statistics.clustered(events, cells), statistics.bootstrap(events, cells, resamples=200, seed=seed)]
    truth = (0.05 * 40 + 0.6 * 4) / 44
    assert coverage(truth, covered) >= 0.9


def test_bootstrap_of_a_skewed_loss():
    rng = np.random.default_rng(5)
    ones = np.ones(400)
    intervals = [statistics.bootstrap(rng.lognormal(0, 1, 400), ones, resamples=300, seed=i) for i in range(300)]
    assert coverage(math.exp(0.5), intervals) >= 0.9
    loss = rng.lognormal(0, 1, 400)
    assert statistics.bootstrap(loss, ones, seed=1) == statistics.bootstrap(loss, ones, seed=1)
    assert statistics.bootstrap(loss, ones, population=400, seed=1).high == pytest.approx(loss.mean())


# ------------------------------------------------------------------------------------------------ strata
def test_weightings():
    strata = [head(10, (30,), "a"), head(10, (31,), "a"), head(60, (30,), "b"), head(120, (31,), "b")]
    assert statistics.weights(strata, "neuron") == pytest.approx(np.array([10, 10, 60, 120]) / 200)
    assert statistics.weights(strata, "layer") == pytest.approx([1 / 4, 1 / 4, 1 / 6, 1 / 3])
    assert statistics.weights(strata, "bit") == pytest.approx([1 / 14, 1 / 26, 6 / 14, 12 / 26])
    with pytest.raises(ValueError, match="one bit each"):
        statistics.weights([head(10)], "bit")
    with pytest.raises(ValueError, match="neuron, layer, bit, got 'area'"):
        statistics.weights(strata, "area")


def test_stratified_interval_covers_with_strata_that_show_nothing():
    """Three of five strata are expected to show less than one event: the plain variance formula would miss them."""
    rng = np.random.default_rng(6)
    p, w, n = np.array([0.3, 0.1, 0.002, 0.002, 0.002]), np.array([0.02, 0.02, 0.32, 0.32, 0.32]), 100
    got, plain = [], []
    for _ in range(1500):
        k = rng.binomial(n, p)
        got.append(statistics.stratified([wilson(x, n) for x in k], w))
        value, half = w @ k / n, 1.96 * math.sqrt((w**2 * k / n * (1 - k / n) / n).sum())
        plain.append(Estimate(value, value - half, value + half))
    assert coverage(w @ p, got) >= 0.92
    assert coverage(w @ p, plain) < 0.88
    silent = statistics.stratified([wilson(0, n)] * 3, [0.5, 0.25, 0.25])
    assert 0 == silent.low == silent.value < 0.3 * statistics.rule_of_three(n) < silent.high


def test_overall_of_results():
    rng = np.random.default_rng(7)
    strata = [head(10, (30,)), head(10, (20,)), head(10, (0,))]
    owner = np.repeat([0, 1], 300)
    rows = records(owner, rng.random(600) < np.where(owner == 0, 0.4, 0.01), delta_loss=rng.random(600))
    got = statistics.overall(rows, strata, "neuron", resamples=200)
    assert set(got) == {*OUTCOMES, "mismatch", "delta_loss"}
    by_hand = (rows["mismatch"][:300].mean() + rows["mismatch"][300:].mean()) / 2  # the third has no fault
    assert got["mismatch"].value == pytest.approx(by_hand)
    assert got["mismatch"].low < by_hand < got["mismatch"].high
    assert got["due"].value == 0 < got["due"].high
    assert got["delta_loss"].low < rows["delta_loss"].mean() < got["delta_loss"].high
    simple = statistics.estimates(rows, resamples=200)
    assert simple["mismatch"].value == pytest.approx(rows["mismatch"].mean())


def test_delta_loss_is_a_mean_over_cells_that_are_not_due():
    rows = records([0, 0], [1, 0], cells=4, delta_loss=[3.0, 1.0])
    rows["due"], rows["tolerable"] = [2, 0], [1, 4]
    assert statistics.estimates(rows)["delta_loss"].value == pytest.approx(4 / 6)
    rows["due"] = 4
    assert math.isnan(statistics.estimates(rows)["delta_loss"].value)


def test_second_stage():
    strata = [head(10, (30,)), head(10, (24,)), head(10, (0,))]
    pilot_plan = faults.FaultPlan.stratified(strata, [20, 20, 100], seed=1)
    owner = pilot_plan[:].stratum
    pilot = records(owner, (owner == 0) & (np.arange(140) % 2 == 0))
    counts = statistics.second_stage(strata, pilot, 600)
    assert sum(counts) == 600 and counts[0] > counts[1] > 20 and counts[2] >= 100
    assert len(pilot_plan.extended(counts)) == 600
    assert statistics.second_stage(strata, pilot, 140) == [20, 20, 100]
    with pytest.raises(ValueError, match="at least the pilot's 140, got 100"):
        statistics.second_stage(strata, pilot, 100)
    with pytest.raises(ValueError, match="faults of every stratum, got none of 2"):
        statistics.second_stage(strata, pilot[:40], 100)


def test_neyman_beats_proportional_at_equal_cost():
    rng = np.random.default_rng(8)
    strata = [head(10, (bit,)) for bit in range(16, 32)]
    p = np.array([0.0005] * 12 + [0.02, 0.14, 0.25, 0.36])
    pilot = np.repeat(np.arange(16), 30)
    counts = statistics.second_stage(strata, records(pilot, rng.random(480) < p[pilot]), 1600)
    variance = [(p * (1 - p) / n).mean() / 16 for n in (np.array(counts), 100)]
    assert variance[0] < 0.6 * variance[1]


# ------------------------------------------------------------------------------------------------ two campaigns
def test_ratio_of_means_and_geometric_mean():
    rng = np.random.default_rng(9)
    ones = np.ones(300)
    pairs = [((rng.lognormal(1, 1, 300), ones), (rng.lognormal(0, 1, 300), ones)) for _ in range(500)]
    ratios = [statistics.ratio(*pair) for pair in pairs]
    assert 0.91 <= coverage(math.e, ratios) <= 0.98
    means = [statistics.geometric_mean(ratios[i : i + 5]) for i in range(0, 500, 5)]
    assert 0.88 <= coverage(math.e, means) <= 1
    assert means[0].high / means[0].low < ratios[0].high / ratios[0].low
    assert math.isnan(statistics.ratio((ones, ones), (0 * ones, ones)).value)
    with pytest.raises(ValueError, match="limits above 0"):
        statistics.geometric_mean([Estimate(math.nan, 0, math.inf)])


# ------------------------------------------------------------------------------------------------ stopping
def test_schedule():
    schedule = Schedule.doubling(100, 1000)
    assert schedule.looks == (100, 200, 400, 800, 1000) and schedule.after(200) == 400 and schedule.after(1000) is None
    narrow, wide = Estimate(0.1, 0.09, 0.12), Estimate(0.1, 0.0, 0.4)
    assert schedule.stops(200, narrow, 0.02) and not schedule.stops(200, wide, 0.02)
    assert not schedule.stops(300, narrow, 0.02)  # not a look
    assert schedule.stops(1000, wide, 0.02)
    with pytest.raises(ValueError, match="ascending"):
        Schedule((200, 100))


def test_scheduled_looks_hold_whatever_the_rule_where_looking_always_does_not():
    """The worst rule there is stops exactly where the interval is wrong."""
    rng = np.random.default_rng(10)
    schedule, p = Schedule.doubling(100, 1600), 0.1
    every = range(20, 1601, 20)

    def limits(n, level):
        return {(n, k): wilson(k, n, level=level) for k in range(n + 1)}

    scheduled = {key: i for n in schedule.looks for key, i in limits(n, schedule.level_of_each).items()}
    always = {key: i for n in every for key, i in limits(n, 0.95).items()}
    wrong = np.zeros(3)
    for _ in range(1000):
        found = np.cumsum(rng.random(1600) < p)
        missed = [not i.low <= p <= i.high for i in (scheduled[n, found[n - 1]] for n in schedule.looks)]
        stop = next(n for n in schedule.looks if schedule.stops(n, scheduled[n, found[n - 1]], 0.03))
        wrong[0] += any(missed)
        wrong[1] += missed[schedule.looks.index(stop)]
        wrong[2] += any(not i.low <= p <= i.high for i in (always[n, found[n - 1]] for n in every))
    assert wrong[0] <= 60 and wrong[1] <= 60  # 5 % and a little luck
    assert wrong[2] > 200


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wilson(5, 4), "0 to n events of n > 0 draws, got 5 of 4"),
        (lambda: wilson(1, 4, population=3), "population of at least the 4 faults drawn, got 3"),
        (lambda: wilson(1, 4, level=1.0), "level between 0 and 1, got 1.0"),
        (lambda: statistics.rule_of_three(0), "got 0"),
        (lambda: statistics.sample_size(0.0), "0 < margin"),
        (lambda: statistics.columns(np.zeros(1, RESULT), "loss"), "mismatch, delta_loss, got 'loss'"),
        (lambda: statistics.stratified([wilson(1, 4)], [0.5, 0.5]), "a weight and a finite value per stratum"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_docstring_examples(run_doctests):
    run_doctests(statistics)
