import json

import numpy as np
import pytest
import torch

import rom
from rom import faults
from rom.faults import FaultPlan, Stratum, Target, allocation, plan, population, records
from rom.faults.plan import MAGIC

HEAD = Stratum("head", Target.OUTPUT, "float32", samples=50, cols=10)
WEIGHT = Stratum("fc", Target.B, "bfloat16", samples=None, cols=20, k=30)
SUM = Stratum("fc", Target.ACCUMULATOR, "float32", samples=7, rows=3, cols=4, k=70)
STRATA = [HEAD, WEIGHT, SUM]


def everything(made):
    return made[:].stratum.tolist(), made[:].sites.tolist()


# ------------------------------------------------------------------------------------------------ strata
def test_every_fault_of_a_stratum_is_another():
    for stratum in STRATA:
        records = stratum.sites(np.arange(stratum.size))
        assert len({tuple(r) for r in records.tolist()}) == stratum.size
        stratum.check(records)
    assert SUM.size == 7 * 3 * 4 * 3 * 32
    assert sorted(set(SUM.sites(np.arange(SUM.size))["k"])) == [32, 64, 70]
    assert (WEIGHT.sites([0])["sample"] == faults.ALL).all()


def test_double_precision_uses_the_upper_word():
    records = Stratum("", Target.OUTPUT, "float64", samples=1, bits=(0, 31, 32, 63)).sites(range(4))
    assert records["flags"].tolist() == [0, 0, 1, 1]
    assert records["xor_mask"].tolist() == [1, 1 << 31, 1, 1 << 31]


def test_kinds_of_faults():
    for kind, and_mask, xor_mask in (("flip", 0xFFFFFFFF, 8), ("stuck0", 0xFFFFFFF7, 0), ("stuck1", 0xFFFFFFF7, 8)):
        record = Stratum("", Target.BIAS, "float32", None, bits=(3,), kind=kind).sites([0])
        assert (record["and_mask"][0], record["xor_mask"][0]) == (and_mask, xor_mask)


def test_bits_by_field():
    assert faults.bits_of(torch.float32, "sign") == (31,)
    assert faults.bits_of(torch.float16, "exponent") == (10, 11, 12, 13, 14)
    assert faults.bits_of(torch.float64, "mantissa") == tuple(range(52))
    assert faults.bits_of(torch.int8) == tuple(range(8))
    for wrong in ("middle", 16, (-1,), ()):
        with pytest.raises(ValueError, match=r"rom\.faults\.bits_of"):
            faults.bits_of(torch.bfloat16, wrong)
    with pytest.raises(ValueError, match="expected all, sign for"):
        faults.bits_of(torch.int8, "exponent")


# ------------------------------------------------------------------------------------------------ schemes
@pytest.mark.parametrize(
    "made",
    [
        FaultPlan.simple(STRATA, 3000, seed=1),
        FaultPlan.stratified(STRATA, [300, 200, 100], seed=1),
        FaultPlan.exhaustive(STRATA),
    ],
    ids=lambda p: p.scheme,
)
def test_any_order_batch_and_shard_gives_the_same_sites(made):
    owners, records = everything(made)
    assert len({(o, tuple(r)[:6], r[7]) for o, r in zip(owners, records)}) == len(made)  # without replacement
    for batch in (1, 7, 64):
        parts = [made[i : i + batch] for i in range(0, min(len(made), 20 * batch), batch)]
        assert [r for p in parts for r in p.sites.tolist()] == records[: 20 * batch]
    for of in (1, 3, 4):
        positions = np.concatenate([made.shard(i, of) for i in range(of)])
        assert sorted(positions) == list(range(len(made)))
        for i in range(of):
            assert made.take(made.shard(i, of)).sites.tolist() == records[i::of]
    assert made[5].sites.tolist() == [records[5]] and made[-1].sites.tolist() == [records[-1]]


def test_extension_keeps_the_first_faults():
    short = FaultPlan.simple(STRATA, 100, seed=9)
    longer = short.extended(400)
    assert everything(longer)[1][:100] == everything(short)[1] and longer.fingerprint() == short.fingerprint()
    some = FaultPlan.stratified(STRATA, [10, 20, 30], seed=9)
    more = some.extended([40, 20, 60])
    for h in range(3):
        old, new = (p[:].sites[p[:].stratum == h].tolist() for p in (some, more))
        assert new[: len(old)] == old
    with pytest.raises(ValueError, match="at least"):
        more.extended([1, 1, 1])
    with pytest.raises(ValueError, match="no continuation"):
        FaultPlan.exhaustive(STRATA).extended(5)


def test_a_simple_sample_hits_strata_in_proportion():
    n = 6000
    shares = np.bincount(FaultPlan.simple(STRATA, n, seed=3)[:].stratum, minlength=3)
    sizes = np.array([s.size for s in STRATA])
    expected = n * sizes / sizes.sum()
    # Hypergeometric: at most as wide as the binomial; 5.2 standard deviations three times fail once in 1.7 million.
    assert (abs(shares - expected) < 5.2 * np.sqrt(expected)).all()


def test_neyman():
    assert faults.neyman([100, 100], [0.3, 0.1], 40) == [30, 10]
    assert faults.neyman([4, 100], [0.5, 0.1], 50) == [4, 46]  # a stratum taken whole
    assert faults.neyman([100, 100, 100], [0.0, 0.0, 0.5], 30, floor=5) == [5, 5, 20]
    assert faults.neyman([10, 20], [0.0, 0.0], 9) == [3, 6]  # nothing known: proportional
    assert faults.neyman([3, 4], [1.0, 1.0], 100) == [3, 4]
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes, deviations = rng.integers(1, 60, 6).tolist(), rng.random(6).round(1).tolist()
        total = int(rng.integers(12, 200))
        counts = faults.neyman(sizes, deviations, total, floor=2)
        assert sum(counts) == min(total, sum(sizes))
        assert all(min(2, s) <= c <= s for c, s in zip(counts, sizes))
    with pytest.raises(ValueError, match="at least 10"):
        faults.neyman([9, 9], [1.0, 1.0], 3, floor=5)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.1, 0.7, 1.0])  # 0.1 and 1.0 are errors in a peer
def test_rates(rate):
    stratum = Stratum("fc", Target.B, "float32", None, cols=100, k=101)
    made = FaultPlan.rate([stratum], rate, seed=2, realisations=2)
    assert len(made) == 2
    for r in range(2):
        records = made[r].sites
        assert (records["fault_id"] == r).all() and len({(s["col"], s["k"]) for s in records}) == len(records)
        bits = int(sum(bin(int(m)).count("1") for m in records["xor_mask"]))
        # 5.3 standard deviations of the binomial, ten times in all: one seed in a million fails.
        assert abs(bits - stratum.size * rate) <= 5.3 * np.sqrt(stratum.size * rate * (1 - rate))
    assert made[0].sites.tolist() == FaultPlan.rate([stratum], rate, seed=2)[:].sites.tolist()
    if 0 < rate < 1:
        assert made[0].sites["xor_mask"].tolist() != made[1].sites["xor_mask"].tolist()


def test_rate_counts_follow_the_binomial():
    stratum = Stratum("fc", Target.B, "float32", None, cols=32, k=32)
    plans = FaultPlan.rate([stratum], 1e-4, seed=5, realisations=800)
    bits = [bin(int(m)).count("1") for m in plans[:].sites["xor_mask"]]
    totals = np.bincount(plans[:].sites["fault_id"], weights=bits, minlength=800)
    mean, variance = totals.mean(), totals.var()
    expected = stratum.size * 1e-4
    assert abs(mean - expected) < 5 * np.sqrt(expected / 800)  # one seed in 1.7 million
    assert abs(variance / expected - 1) < 5 * np.sqrt(2.3 / 800)  # kurtosis 3 + 1/3.28: likewise


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize(
    "made",
    [
        FaultPlan.stratified(STRATA, [3, 2, 1], seed=2**64 - 1, model="m", data="d"),
        FaultPlan.rate(STRATA, 0.01, seed=4),
        FaultPlan.from_sites(STRATA, [0, 2], np.concatenate([HEAD.sites([5], 0), SUM.sites([9], 1)])),
    ],
    ids=["stratified", "rate", "file"],
)
def test_files(made, tmp_path):
    made.save(tmp_path / "plan.rom")
    again = FaultPlan.load(tmp_path / "plan.rom")
    assert everything(again) == everything(made) and again.fingerprint() == made.fingerprint()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.rom"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "plan.rom"
    FaultPlan.rate(STRATA, 0.01, seed=4).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged"):
        FaultPlan.load(path)
    path.write_bytes(b"something else\n{}")
    with pytest.raises(ValueError, match="not a fault plan"):
        FaultPlan.load(path)
    line = json.loads(whole[len(MAGIC) :].split(b"\n")[0]) | {"schema": 99}
    path.write_bytes(MAGIC + json.dumps(line).encode() + b"\n")
    with pytest.raises(ValueError, match="expected schema 1, got 99"):
        FaultPlan.load(path)


def test_fingerprints_tell_plans_and_models_apart():
    prints = {
        FaultPlan.simple(STRATA, 9, seed=1).fingerprint(),
        FaultPlan.simple(STRATA, 9, seed=2).fingerprint(),
        FaultPlan.simple(STRATA[:2], 9, seed=1).fingerprint(),
        FaultPlan.simple(STRATA, 9, seed=1, model="x").fingerprint(),
        FaultPlan.stratified(STRATA, [3, 3, 3], seed=1).fingerprint(),
    }
    assert len(prints) == 5
    model = torch.nn.Linear(3, 4).bfloat16()
    before = faults.model_fingerprint(model)
    assert before == faults.model_fingerprint(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert before != faults.model_fingerprint(model)


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Stratum("", Target.A, "float8", 1), "a dtype of float64"),
        (lambda: Stratum("", Target.A, "float32", 0), "samples of 1"),
        (lambda: Stratum("", Target.A, "float32", 1, kind="melt"), "kind of flip"),
        (lambda: Stratum("", Target.B, "float32", 2**20, cols=2**20, k=2**20), r"2\*\*62 faults"),
        (lambda: FaultPlan.simple([], 1, seed=0), "at least one stratum"),
        (lambda: FaultPlan.simple([HEAD], 16001, seed=0), "count of 0 to 16000, got 16001"),
        (lambda: FaultPlan.simple([HEAD], 1, seed=-1), "seed of 0"),
        (lambda: FaultPlan.stratified([HEAD, SUM], [1], seed=0), "expected 2 counts, got 1"),
        (lambda: FaultPlan.rate([HEAD], 1.5, seed=0), "rate of 0 to 1, got 1.5"),
        (lambda: faults.stuck_at(2, 1), "0 or 1, got 2"),
        (lambda: faults.sites(Target.A, faults.flip(1), row=-1), "row of 0"),
        (
            lambda: FaultPlan.from_sites([HEAD], 0, faults.sites(Target.OUTPUT, faults.flip(1), sample=0, col=10)),
            "col below 10 in layer 'head'.*got 10 in site 0",
        ),
        (lambda: FaultPlan.from_sites([HEAD], 0, faults.sites(Target.A, faults.flip(1), sample=0)), "target OUTPUT"),
        (lambda: FaultPlan.from_sites([HEAD], 3, HEAD.sites([0])), "strata below 1"),
        (lambda: HEAD.sites([16000]), "fault number below 16000"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_examples(run_doctests):
    for module in (plan, population, records, allocation):
        run_doctests(module)
    assert rom.faults is faults
