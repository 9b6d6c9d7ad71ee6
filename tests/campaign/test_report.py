import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rom import campaign, faults
from rom.campaign import RESULT, CampaignError, Store, figures, report, statistics, tables
from rom.campaign.report import Campaign
from rom.faults import FaultPlan, Stratum, Target

VOID = {"meta", "img"}


def strata():
    conv = Stratum("conv", Target.OUTPUT, "float32", samples=50, cols=40)
    head = Stratum("head", Target.B, "bfloat16", samples=None, cols=10, k=16)
    return [*(s for s in conv.by_bit() if s.bits[0] >= 20), *head.by_bit()]


def results(plan, seed=0):
    """Made-up results: upper exponent bits change the top-1, a fault of the shared weight meets 50 samples."""
    rng = np.random.default_rng(seed)
    table = np.zeros(len(plan), RESULT)
    drawn = plan[:]
    table["position"], table["stratum"] = np.arange(len(plan)), drawn.stratum
    shared = np.array([plan.strata[h].samples is None for h in drawn.stratum])
    table["sample"], table["cells"] = np.where(shared, -1, drawn.sites["sample"].astype(np.int64)), 1
    table["cells"][shared] = 50
    high = np.array([plan.strata[h].bits[-1] in (13, 14, 29, 30) for h in drawn.stratum])
    table["due"] = high & (rng.random(len(plan)) < 0.1)
    table["critical"] = rng.binomial(table["cells"] - table["due"], np.where(high, 0.4, 0.0))
    table["mismatch"] = table["critical"] + table["due"]
    table["tolerable"] = table["cells"] - table["critical"] - table["due"]
    table["delta_loss"] = rng.lognormal(0, 1, len(plan)) * table["tolerable"]
    return table


@pytest.fixture(scope="module")
def finished():
    counts = [12] * len(strata())
    counts[3] = 0
    plan = FaultPlan.stratified(strata(), counts, seed=5)
    golden = {"samples": 50, "accuracy": 0.96, "loss": 0.12, "top2_difference": 0.8, "answers": "digest"}
    return Campaign(results(plan), plan, golden, {"model": "m<1>", "bounds": None})


class Checker(HTMLParser):
    """Tags that close, and everything that would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


# ------------------------------------------------------------------------------------------------ the page
def test_page_is_one_static_file_with_everything_in_it(finished, tmp_path):
    ablation = [{"head": "linear", "ratio": 1.0}, {"head": "cos & text", "ratio": statistics.wilson(3, 10)}]
    text = report.write(finished, tmp_path / "r.html", ablation=ablation, title="Digits <b>")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    found = Checker(page)
    assert not found.open and "<script" not in page and "@import" not in page
    assert len(found.addresses) == 3 and all(a.startswith("data:image/svg+xml;base64,") for a in found.addresses)
    for picture in found.addresses:
        svg = base64.b64decode(picture.split(",")[1]).decode()
        assert "<svg" in svg and not re.findall(r'(?:href|src)="(?!#|data:)', svg)
    words = " ".join(" ".join(found.text).split())
    for expected in ("Digits <b>", "cos & text", "0.3 [0.108, 0.603]", "m<1>", finished.plan.fingerprint(), "0.96"):
        assert expected in words
    assert "1 of 28 strata have no fault yet" in words and "rule of three" in words and "@media print" in page
    assert "cos & text" in text and "| conv" in text and "<" not in text.replace("<b>", "")


def test_the_same_campaign_gives_the_same_bytes(finished, tmp_path):
    for name in ("a", "b"):
        report.write(finished, tmp_path / name)
    one, other = ((tmp_path / name).read_text() for name in ("a", "b"))
    strip = re.compile(r"base64,[^\"]*")  # matplotlib salts the names inside
    assert strip.sub("", one) == strip.sub("", other)


def test_from_a_store_and_incomplete(tmp_path):
    plan = FaultPlan.simple(strata(), 40, seed=2)
    with Store.create(tmp_path / "c.sqlite", plan, {"model": "abc"}, block_size=16, golden={"accuracy": 0.5}) as store:
        store.add(0, results(plan)[store.blocks[0]])
        store.set("stop", {"margin": 0.01, "first": 10, "level": 0.95})
    text = report.write(tmp_path / "c.sqlite", tmp_path / "c.html")
    assert text == report.summary(tmp_path / "c.sqlite")
    assert "16 done of 40 planned (40.0%)" in text and "not complete" in text and "accuracy: 0.5" in text
    assert "0.9833 each; 3 looks" in text  # 16, 32, 40
    with pytest.raises(CampaignError, match="no campaign at"):
        report.write(tmp_path / "d.sqlite", tmp_path / "d.html")
    assert not (tmp_path / "d.html").exists()


def test_nothing_done_yet(tmp_path):
    plan = FaultPlan.exhaustive(strata()[:2])
    text = report.write(Campaign(np.zeros(0, RESULT), plan), tmp_path / "r.html")
    assert "No fault has been injected yet." in text and "no interval holds" in text


def test_cells_that_are_all_due(tmp_path):
    plan = FaultPlan.simple(strata(), 30, seed=3)
    table = results(plan)
    table["due"] = table["mismatch"] = table["cells"]
    table["tolerable"] = table["critical"] = 0
    table["delta_loss"] = 0
    text = report.write(Campaign(table, plan), tmp_path / "r.html")
    assert "100.0 % [" in text and "| –" in text  # no loss to speak of


def test_missing_matplotlib_is_said_and_the_summary_does_without(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(CampaignError, match=r"pip install 'rom-kernels\[campaign\]'"):
        report.write(finished, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
    assert "top-1 changes" in report.summary(finished)


# ------------------------------------------------------------------------------------------------ the numbers
def test_groups_and_overall(finished):
    groups = tables.by_layer(finished.table, finished.plan, 0.95, resamples=100)
    assert [g.name for g in groups] == ["conv · output", "head · weight"]
    assert groups[0].population == 50 * 40 * 12 and groups[0].faults == 11 * 12 and groups[1].cells == 16 * 12 * 50
    conv = finished.table[finished.table["stratum"] < 12]
    shares = [conv["critical"][conv["stratum"] == h].mean() for h in range(12) if h != 3]
    assert groups[0].estimates["critical"].value == pytest.approx(np.mean(shares))  # strata of equal size
    found = tables.overall(finished.table, finished.plan, groups, 0.95, resamples=100)
    values = [g.estimates["critical"].value for g in groups]
    assert found["layer"]["critical"].value == pytest.approx(np.mean(values))
    sizes = [50 * 40 * 11, groups[1].population]  # the stratum without a fault has no say
    assert found["neuron"]["critical"].value == pytest.approx(np.average(values, weights=sizes))


def test_an_exhaustive_campaign_has_intervals_of_width_0():
    plan = FaultPlan.exhaustive([Stratum("head", Target.OUTPUT, "bfloat16", samples=5, cols=3)])
    (group,) = tables.by_layer(results(plan), plan, 0.95)
    assert group.faults == group.population == 240
    for estimate in group.estimates.values():
        assert estimate == pytest.approx((estimate.value,) * 3)


@pytest.mark.parametrize("scheme", ["stratified", "simple", "exhaustive"])
def test_bits_of_faults(scheme):
    parts = [Stratum("a", Target.OUTPUT, dtype, samples=3, cols=2) for dtype in ("float64", "float16", "int8")]
    plan = {
        "stratified": lambda: FaultPlan.stratified(parts, [50, 20, 10], seed=1),
        "simple": lambda: FaultPlan.simple(parts, 90, seed=1),
        "exhaustive": lambda: FaultPlan.exhaustive(parts),
    }[scheme]()
    found = tables.bits_of_faults(plan, np.arange(len(plan)))
    for position, bit in enumerate(found.tolist()):
        site = plan[position].sites[0]
        assert int(site["xor_mask"]) << (32 if site["flags"] else 0) == 1 << bit


def test_bits_of_stuck_and_several_bits():
    stuck = FaultPlan.exhaustive([Stratum("a", Target.OUTPUT, "float16", samples=1, kind="stuck0")])
    assert tables.bits_of_faults(stuck, np.arange(16)).tolist() == list(range(16))
    sites = faults.sites(Target.OUTPUT, faults.flip(3), sample=0, fault_id=[0, 2, 2])
    sites["xor_mask"][1:] = 8
    one = faults.sites(Target.OUTPUT, faults.flip(1 << 9), sample=0, fault_id=3)
    given = FaultPlan.from_sites([Stratum("a", Target.OUTPUT, "float16", samples=1)], 0, np.concatenate([sites, one]))
    assert tables.bits_of_faults(given, np.arange(4)).tolist() == [-1, -1, -1, 9]  # two bits, none, two sites, one


def test_bit_map_tells_unseen_from_silent_and_from_absent(finished):
    found = tables.bit_map(finished.table, finished.plan)
    assert found.names == ["conv · output", "head · weight"] and found.rates.shape == (2, 32)
    assert found.exists[0].nonzero()[0].tolist() == list(range(20, 32)) and found.exists[1].sum() == 16
    assert np.isnan(found.rates[0, 23]) and found.faults[0, 23] == 0 and found.exists[0, 23]
    assert found.rates[0, 20] == 0 and found.faults[0, 20] == 12 and found.rates[0, 30] > 0.1
    assert found.borders == [(23, 31), (7, 15)]
    drawn = figures.bit_map(found)
    hatched = [p for p in drawn.axes[0].patches if p.get_hatch()]
    assert [p.get_xy() for p in hatched] == [(31 - 23, 0)]


def test_losses_without_a_change_have_a_place_on_the_logarithmic_axis(finished):
    table = finished.table.copy()
    table["delta_loss"] = 0
    groups = tables.by_layer(table, finished.plan, 0.95, resamples=50)
    axes = figures.losses(groups).axes[0]
    assert [line.get_markerfacecolor() for line in axes.lines] == ["white", "white"]


def test_report_is_exported():
    assert campaign.report.write is report.write
