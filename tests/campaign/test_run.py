"""Running a campaign: interrupted, killed, shared out, extended or stopped, its table is the one of a single go."""

import contextlib
import copy
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from rom import campaign, faults
from rom.campaign import CampaignError, Stop, Store, progress, runner, statistics

BLOCK = 16


@pytest.fixture(scope="module")
def subject():
    """A small net, its survey, its evaluation set, and plans of 120 faults by scheme."""
    torch.manual_seed(5)
    layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5)]
    model = torch.nn.Sequential(*layers).eval()
    inputs = torch.randn(12, 1, 6, 6)
    labels = model(inputs).argmax(1)
    labels[:3] = 0  # some wrong already
    found = faults.survey(model, inputs)
    strata = found.strata(12, [faults.Target.OUTPUT, faults.Target.B], bits=(20, 26, 30, 31))
    plans = {
        "simple": faults.FaultPlan.simple(strata, 120, seed=3),
        "stratified": faults.FaultPlan.stratified(strata, [40, 20, 40, 20], seed=3),
    }
    return model, found, inputs, labels, plans


def go(subject, path, plan="simple", **options):
    _, found, inputs, labels, plans = subject
    plan = plans[plan] if isinstance(plan, str) else plan
    options = {"block_size": BLOCK, "batch_size": 8, "progress": False} | options
    return campaign.run(found, plan, inputs, labels, store=path, **options)


@pytest.fixture(scope="module")
def whole(subject, tmp_path_factory):
    """The table of each scheme in one go."""
    torch.set_num_threads(1)
    tables = {}
    for scheme in subject[4]:
        path = tmp_path_factory.mktemp("whole") / "c.sqlite"
        assert go(subject, path, scheme) == campaign.Summary("complete", 120, 120, path)
        tables[scheme] = campaign.read(path).table
    return tables


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # and forked children have no pool to wait for


def test_the_table_of_one_go(subject, whole):
    for scheme, table in whole.items():
        assert table["position"].tolist() == list(range(120))
        assert (sum(table[name] for name in campaign.OUTCOMES) == table["cells"]).all()
        assert (table["stratum"] == subject[4][scheme][:].stratum).all()
        assert len(np.unique(table[["masked", "critical"]])) > 2


def test_the_golden_run_is_kept(subject, tmp_path):
    model, _, inputs, labels, _ = subject
    go(subject, tmp_path / "c.sqlite")
    golden = campaign.read(tmp_path / "c.sqlite").golden
    best = model(inputs).softmax(1).topk(2).values
    assert golden["samples"] == 12 and golden["accuracy"] == (model(inputs).argmax(1) == labels).double().mean()
    assert golden["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(inputs), labels).item(), rel=1e-5)
    assert golden["top2_difference"] == pytest.approx((best[:, 0] - best[:, 1]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_block(number, subject, whole, tmp_path, monkeypatch):
    path, add = tmp_path / "c.sqlite", Store.add

    def interrupted(self, block, *rest):
        add(self, block, *rest)
        if block == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", interrupted)
        assert go(subject, path) == campaign.Summary("interrupted", 3 * BLOCK, 120, path)
    assert not campaign.read(path).complete
    assert go(subject, path, resume=True).state == "complete"
    assert campaign.read(path).table.tobytes() == whole["simple"].tobytes()


def killed_run(subject, path, plan, pipe):
    add = Store.add

    def slowly(self, block, results, seconds):
        add(self, block, results, seconds)
        pipe.send(block)

    Store.add = slowly
    go(subject, path, plan, resume=True)


@pytest.mark.parametrize("plan", ["simple", "stratified"])
def test_kill_9_again_and_again(plan, subject, whole, tmp_path):
    """Killed at arbitrary moments until it is complete: nothing reported is lost, nothing is there twice."""
    path, reported, deaths = tmp_path / "c.sqlite", set(), 0
    random = np.random.default_rng(7)
    delays = [0.0, 0.05, *random.uniform(0.1, 0.5, 3)]
    while deaths < len(delays):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=killed_run, args=(subject, path, plan, theirs))
        child.start()
        theirs.close()
        if deaths > 1 and len(reported) < 6:
            with contextlib.suppress(EOFError):
                reported.add(ours.recv())  # so that every life gets somewhere
        time.sleep(delays[deaths] / 10)
        child.kill()
        with contextlib.suppress(EOFError):
            while True:
                reported.add(ours.recv())
        child.join()
        deaths += 1
        if Store.exists(path):
            with Store(path) as store:
                done = set(store.done().tolist())
                table = store.results().table
                expected = np.sort(np.concatenate([[], *(store.blocks[b] for b in done)]))
            assert reported <= done and table["position"].tolist() == expected.tolist()
    assert go(subject, path, plan, resume=True).state == "complete"
    assert campaign.read(path).table.tobytes() == whole[plan].tobytes()


@pytest.mark.parametrize("plan", ["simple", "stratified"])
def test_four_shards_are_one_process(plan, subject, whole, tmp_path):
    paths = [tmp_path / f"{i}.sqlite" for i in range(4)]
    counts = [go(subject, path, plan, shard=(i, 4)).done for i, path in enumerate(paths)]
    assert sum(counts) == 120 and max(counts) <= 2 * BLOCK
    assert campaign.merge(paths[:3], tmp_path / "all.sqlite") == 120 - counts[3]
    assert campaign.merge(paths, tmp_path / "all.sqlite") == counts[3]
    assert campaign.read(tmp_path / "all.sqlite").table.tobytes() == whole[plan].tobytes()
    assert go(subject, tmp_path / "all.sqlite", plan, resume=True).state == "complete"  # a campaign like any other
    assert campaign.merge([*paths[1:], paths[0]], paths[0]) == 120 - counts[0]  # into one of them


@pytest.mark.parametrize("plan, counts", [("simple", 200), ("stratified", [40, 50, 60, 20])])
def test_a_longer_plan_continues(plan, counts, subject, whole, tmp_path):
    longer = subject[4][plan].extended(counts)
    go(subject, tmp_path / "fresh.sqlite", longer)
    go(subject, tmp_path / "grown.sqlite", plan)
    assert go(subject, tmp_path / "grown.sqlite", longer, resume=True).faults == len(longer)
    tables = [campaign.read(tmp_path / name).table for name in ("fresh.sqlite", "grown.sqlite")]
    assert tables[0].tobytes() == tables[1].tobytes()
    with pytest.raises(CampaignError, match=f"a campaign of {len(longer)} faults, got a plan of 120"):
        go(subject, tmp_path / "grown.sqlite", plan, resume=True)


def test_another_campaign_is_refused_with_both_values(subject, tmp_path):
    model, found, inputs, labels, plans = subject
    path = tmp_path / "c.sqlite"
    with pytest.raises(CampaignError, match="holds a campaign already"):
        go(subject, path)
        go(subject, path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[3].bias += 1
    wrong_answers = labels.clone()
    wrong_answers[5] += 1
    for changed, name in [
        ((model, other, inputs, labels, plans), "model"),
        ((model, found, inputs, wrong_answers, plans), "data"),
    ]:
        with pytest.raises(CampaignError, match=rf"another {name}: it has [0-9a-f]+, this run has [0-9a-f]+\. Give"):
            go(changed, path, resume=True)
    plan = faults.FaultPlan.simple(plans["simple"].strata, 120, seed=4)
    with pytest.raises(CampaignError, match=r"another plan: it has [0-9a-f]+, this run has"):
        go(subject, path, plan, resume=True)
    with pytest.raises(CampaignError, match="another batch_size: it has 8, this run has 4"):
        go(subject, path, batch_size=4, resume=True)
    with pytest.raises(CampaignError, match=r"another bounds: it has None, this run has \{'3': \[-1, 1\]\}"):
        go(subject, path, bounds={"3": (-1, 1)}, resume=True)
    with pytest.raises(CampaignError, match="blocks of 16 faults, got a block_size of 8"):
        go(subject, path, block_size=8, resume=True)
    assert go(subject, path, block_size=None, resume=True).state == "complete"


def test_a_plan_says_what_it_is_for(subject, tmp_path):
    model, _, inputs, labels, plans = subject
    strata = plans["simple"].strata
    mine = faults.model_fingerprint(model), campaign.data_fingerprint(inputs, labels)
    go(subject, tmp_path / "c.sqlite", faults.FaultPlan.simple(strata, 5, 0, *mine))
    with pytest.raises(CampaignError, match=f"made for another data: it says abc, this one is {mine[1]}"):
        go(subject, tmp_path / "d.sqlite", faults.FaultPlan.simple(strata, 5, 0, mine[0], "abc"))


def test_other_answers_of_the_same_weights(subject, tmp_path):
    path = tmp_path / "c.sqlite"
    go(subject, path, faults.FaultPlan.simple(subject[4]["simple"].strata, 5, 0))
    plan = campaign.read(path).plan
    for key, kind in (("logits", None), ("answers", CampaignError)):
        with Store(path, write=True) as store:
            store.set("golden", store.golden | {key: "another"})
        expected = pytest.raises(kind, match="other answers") if kind else pytest.warns(UserWarning, match="last bits")
        with expected:
            go(subject, path, plan, resume=True)


# ------------------------------------------------------------------------------------------------ stopping
def looks(path, stop, plan):
    """(faults, estimate) that a campaign meets, computed from a complete table."""
    with Store(path) as store:
        table, blocks = store.results().table, store.blocks
    schedule = stop.schedule(plan, BLOCK)
    for look in schedule.looks:
        part = table[np.isin(table["position"], np.concatenate(list(blocks))[:look])]
        yield look, runner.silent_rate(part, plan, schedule.level_of_each)


@pytest.mark.parametrize("plan", ["simple", "stratified"])
def test_it_stops_at_the_first_look_that_suffices(plan, subject, tmp_path, monkeypatch):
    go(subject, tmp_path / "whole.sqlite", plan)
    found = list(looks(tmp_path / "whole.sqlite", Stop(1, first=10), subject[4][plan]))
    assert [look for look, _ in found] == [16, 32, 64, 120]
    widths = [max(e.high - e.value, e.value - e.low) for _, e in found]
    stop = Stop(min(widths[1:3]), first=10)
    first = next(number for number, width in enumerate(widths) if width <= stop.margin)
    path, look = tmp_path / "c.sqlite", found[first][0]
    assert first < 3 and go(subject, path, plan, stop=stop) == campaign.Summary("stopped", look, 120, path)
    with Store(path) as store:
        table = store.results().table
        assert store.get("stopped")["faults"] == look and store.get("stopped")["rate"] == list(found[first][1])
    # Interrupted just before the look or resumed behind it: the same.
    assert go(subject, path, plan, stop=stop, resume=True).state == "stopped"
    assert campaign.read(path).table.tobytes() == table.tobytes()
    # The whole plan is still there to be run, but no other rule.
    with pytest.raises(CampaignError, match=r"has the stopping rule \{.*\}, got \{.*'margin': 0\.3"):
        go(subject, path, plan, stop=Stop(0.3), resume=True)
    with pytest.raises(CampaignError, match="a stopping rule for 120 faults, got a plan of"):
        counts = 200 if plan == "simple" else [50, 50, 50, 50]
        go(subject, path, subject[4][plan].extended(counts), stop=stop, resume=True)
    assert go(subject, path, plan, resume=True).state == "complete"
    with pytest.raises(CampaignError, match="has the stopping rule None"):
        go(subject, path, plan, stop=stop, resume=True)


def test_the_rate_a_stop_looks_at(whole, subject):
    table, plan = whole["simple"], subject[4]["simple"]
    silent = (table["sdc"] + table["critical"]).astype(float)
    direct = statistics.clustered(silent, table["cells"].astype(float), plan.population, 0.9)
    assert runner.silent_rate(table, plan, 0.9) == direct
    stratified = subject[4]["stratified"]
    some = whole["stratified"][whole["stratified"]["stratum"] != 2]
    assert (
        runner.silent_rate(some, stratified, 0.9).high > runner.silent_rate(whole["stratified"], stratified, 0.9).high
    )


def test_arguments_that_do_not_fit(subject, tmp_path):
    path, exhaustive = tmp_path / "c.sqlite", faults.FaultPlan.exhaustive(subject[4]["simple"].strata[:1])
    for options, message in [
        ({"stop": Stop(0.1), "plan": exhaustive}, "not in random order"),
        ({"stop": Stop(0.1), "shard": (0, 2)}, "cannot see the others"),
        ({"shard": (2, 2)}, r"0 <= i < n, got \(2, 2\)"),
        ({"block_size": 0}, "block_size and shards >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            go(subject, path, **options)
    model, found, inputs, labels, plans = subject
    with pytest.raises(ValueError, match="a label for every input, got 12 and 5"):
        go((model, found, inputs, labels[:5], plans), path)
    assert not path.exists()
    with pytest.raises(ValueError, match="at least one store"):
        campaign.merge([], path)


def test_blocks_fill_the_batches(subject):
    outputs = [s for s in subject[4]["simple"].strata if s.samples is not None]
    plan = faults.FaultPlan.simple(outputs, 10, 0)
    assert runner.default_block_size(plan, 32) == 2 * 32 * 8
    assert runner.default_block_size(plan, 4096) == 8192
    assert runner.default_block_size(subject[4]["simple"], 32) == 256


def test_progress(subject, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    go(subject, tmp_path / "c.sqlite", progress=True, stop=Stop(0.001, first=32))
    err = capsys.readouterr().err
    assert " 13%  16 of 120 faults  " in err and " faults/s  about 0:" in err and "100%" in err
    assert "look at 32 faults: silent corruptions 0" in err


def test_progress_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.Progress(100, 20, shown=True) as bar:
        bar.add(30)
        bar.say("a look")
    err = capsys.readouterr().err
    assert "a look" in err and "/100" in err
