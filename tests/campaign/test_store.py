"""The store: whole at every moment, one writer, refusals that name both sides."""

import contextlib
import csv
import multiprocessing
import os
import sqlite3

import numpy as np
import pytest

from rom import campaign, faults
from rom.campaign import RESULT, Blocks, CampaignError, Store, blocks

IDENTITY = {"plan": "p", "model": "m", "options": {"mode": "exact", "bounds": None}}


def stratum(name, cols=10, target=faults.Target.OUTPUT):
    return faults.Stratum(name, target, "float32", samples=20, rows=3, cols=cols, bits=(23, 30))


STRATA = [stratum("a"), stratum("b", 4), stratum("c", 7)]
SIMPLE = faults.FaultPlan.simple(STRATA, 100, seed=1)
STRATIFIED = faults.FaultPlan.stratified(STRATA, [10, 30, 20], seed=1)


def made_up(plan, positions):
    """Results that depend on the fault alone, not on its position."""
    found = plan.take(positions)
    table = np.zeros(len(positions), RESULT)
    table["position"], table["stratum"], table["sample"] = positions, found.stratum, found.sites["sample"]
    table["cells"] = table["critical"] = 1
    table["old"] = found.sites["fault_id"]
    table["delta_loss"] = found.sites["row"] * 0.1 + found.sites["col"]
    table["new"] = 0xFFFFFFFF
    return table


def fill(store, numbers=None):
    for block in range(len(store.blocks)) if numbers is None else numbers:
        store.add(block, made_up(store.plan, store.blocks[block]), seconds=0.5)


@pytest.mark.parametrize("plan", [SIMPLE, STRATIFIED, faults.FaultPlan.exhaustive(STRATA[:1])], ids=lambda p: p.scheme)
def test_blocks_partition_the_plan(plan):
    parts = Blocks(plan, 7, [plan.counts])
    assert sorted(np.concatenate(list(parts)).tolist()) == list(range(len(plan)))
    assert [len(p) for p in parts][:-1] == [7] * (len(parts) - 1)
    assert [parts.faults(b) for b in range(len(parts) + 1)] == [min(7 * b, len(plan)) for b in range(len(parts) + 1)]
    with pytest.raises(IndexError, match="below"):
        parts[len(parts)]


def test_every_beginning_of_a_stratified_campaign_is_in_proportion():
    parts = Blocks(STRATIFIED, 6, [STRATIFIED.counts])
    for n in range(1, len(parts) + 1):
        owners = STRATIFIED.take(np.concatenate([parts[b] for b in range(n)])).stratum
        assert (abs(np.bincount(owners, minlength=3) - 6 * n * np.array([10, 30, 20]) / 60) <= 1).all()


@pytest.mark.parametrize("plan", [SIMPLE, STRATIFIED], ids=lambda p: p.scheme)
def test_what_was_added_is_read_back(plan, tmp_path):
    with Store.create(tmp_path / "c.sqlite", plan, IDENTITY, 7, {"accuracy": 0.5}) as store:
        fill(store)
        assert store.done().tolist() == list(range(len(store.blocks))) and store.seconds() == len(store.blocks) * 0.5
    results = campaign.read(tmp_path / "c.sqlite")
    assert results.table.tobytes() == made_up(plan, np.arange(len(plan))).tobytes() and results.complete
    assert results.plan.fingerprint() == plan.fingerprint() and results.plan.counts == plan.counts
    assert results.identity == IDENTITY and results.golden == {"accuracy": 0.5}
    assert os.listdir(tmp_path) == ["c.sqlite"]  # the log and the lock are gone


def test_extremes_survive(tmp_path):
    table = made_up(SIMPLE, np.arange(3))
    table["delta_loss"] = np.inf, np.nan, 5e-324
    plan = faults.FaultPlan.simple(STRATA, 3, seed=1)
    with Store.create(tmp_path / "c.sqlite", plan, IDENTITY, 10) as store:
        store.add(0, table)
        assert store.results().table.tobytes() == table.tobytes()


@pytest.mark.parametrize("plan, longer", [(SIMPLE, 150), (STRATIFIED, [25, 40, 20])], ids=["simple", "stratified"])
@pytest.mark.parametrize("begun", [0, 4, None])
def test_an_extended_campaign_is_that_of_the_longer_plan(plan, longer, begun, tmp_path):
    longer = plan.extended(longer)
    with Store.create(tmp_path / "c.sqlite", plan, IDENTITY, 7) as store:
        fill(store, None if begun is None else range(begun))
        done = store.done().tolist()
        store.extend(longer)
        assert store.done().tolist() == done
    with Store(tmp_path / "c.sqlite", write=True) as store:
        store.extend(longer)  # nothing to do
        fill(store, sorted(set(range(len(store.blocks))) - set(done)))
        assert store.results().table.tobytes() == made_up(longer, np.arange(len(longer))).tobytes()
        with pytest.raises(CampaignError, match=f"{len(longer)} faults, got a plan of {len(plan)}"):
            store.extend(plan)


@pytest.mark.parametrize("plan", [SIMPLE, STRATIFIED], ids=lambda p: p.scheme)
def test_shards_merge_into_the_whole(plan, tmp_path):
    paths = [tmp_path / f"{i}.sqlite" for i in range(3)]
    for i, path in enumerate(paths):
        with Store.create(path, plan, IDENTITY, 7) as store:
            fill(store, range(i, len(store.blocks), 3))
    with Store.create(tmp_path / "all.sqlite", plan, IDENTITY, 7) as whole:
        for path in [*paths, paths[0]]:  # twice the same: nothing is doubled
            with Store(path) as part:
                whole.merge(part)
        assert whole.results().table.tobytes() == made_up(plan, np.arange(len(plan))).tobytes()


def test_shards_that_disagree_are_refused(tmp_path):
    for name in "ab":
        with Store.create(tmp_path / name, SIMPLE, IDENTITY, 7) as store:
            table = made_up(SIMPLE, store.blocks[2])
            table["delta_loss"] += name == "b"
            store.add(2, table)
    with (
        Store(tmp_path / "a", write=True) as store,
        Store(tmp_path / "b") as other,
        pytest.raises(CampaignError, match="both have block 2 and disagree"),
    ):
        store.merge(other)
    with (
        Store.create(tmp_path / "c", SIMPLE, IDENTITY, 8) as store,
        Store(tmp_path / "b") as other,
        pytest.raises(CampaignError, match="blocks of 8 here, 100 in blocks of 7 there"),
    ):
        store.merge(other)


def test_another_campaign_is_refused_with_both_values(tmp_path):
    with Store.create(tmp_path / "c.sqlite", SIMPLE, IDENTITY, 7) as store:
        store.check(IDENTITY)
        with pytest.raises(CampaignError, match=r"another model: it has m, this run has n\. Give the same"):
            store.check(IDENTITY | {"model": "n"})
        with pytest.raises(CampaignError, match=r"another precision: it has None, this run has 0\.1\."):
            store.check(IDENTITY | {"precision": 0.1})
        with pytest.raises(CampaignError, match="holds a campaign already"):
            store.close()
            Store.create(tmp_path / "c.sqlite", SIMPLE, IDENTITY, 7)


def test_a_block_is_added_once_and_whole(tmp_path):
    with Store.create(tmp_path / "c.sqlite", SIMPLE, IDENTITY, 7) as store:
        fill(store, [3])
        with pytest.raises(CampaignError, match="UNIQUE"):
            fill(store, [3])
        for wrong in (store.blocks[2], store.blocks[3][:-1], store.blocks[3][[0, 0, 1, 2, 3, 4, 5]]):
            with pytest.raises(ValueError, match="results of the 7 faults"):
                store.add(4 if wrong is store.blocks[2] else 3, made_up(SIMPLE, wrong))
        assert len(store.results().table) == 7


def test_one_writer_and_many_readers(tmp_path):
    with Store.create(tmp_path / "c.sqlite", SIMPLE, IDENTITY, 7) as store:
        fill(store, [0])
        with pytest.raises(CampaignError, match="another process is writing"):
            Store(tmp_path / "c.sqlite", write=True)
        with Store(tmp_path / "c.sqlite") as reader:
            fill(store, [1])
            assert len(reader.results().table) == 14
    Store(tmp_path / "c.sqlite", write=True).close()


def test_a_full_disk_loses_nothing(tmp_path):
    with Store.create(tmp_path / "c.sqlite", SIMPLE.extended(1500), IDENTITY, 70) as store:
        fill(store, [0])
        pages = store._database.execute("pragma page_count").fetchone()[0]
        store._database.execute(f"pragma max_page_count = {pages}")
        with pytest.raises(CampaignError, match=r"full\. What was done before is safe: make room"):
            fill(store, range(1, len(store.blocks)))
        done = store.done().tolist()
        store._database.execute("pragma max_page_count = 100000")
        fill(store, sorted(set(range(len(store.blocks))) - set(done)))
    assert campaign.read(tmp_path / "c.sqlite").complete


def test_files_that_are_no_campaign(tmp_path):
    path = tmp_path / "c.sqlite"
    with pytest.raises(CampaignError, match="there is no campaign at"):
        Store(path)
    path.write_bytes(b"")
    assert not Store.exists(path)
    with pytest.raises(CampaignError, match="it is empty"):
        Store(path)
    path.write_bytes(b"A text, long enough to be taken for a database's first page.\n" * 100)
    for write in (False, True):
        with pytest.raises(CampaignError, match=r"not a database\. It is damaged or no campaign"):
            Store(path, write=write)
    path.unlink()
    database = sqlite3.connect(path)
    database.execute("create table other (x)")
    database.close()
    with pytest.raises(CampaignError, match="a database of something else"):
        Store(path)
    with pytest.raises(CampaignError, match="No such file or directory"):
        Store.create(tmp_path / "nowhere" / "c.sqlite", SIMPLE, IDENTITY, 7)


def test_a_damaged_store_is_refused(tmp_path):
    path = tmp_path / "c.sqlite"
    with Store.create(path, SIMPLE, IDENTITY, 7) as store:
        fill(store)
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(range(256)) * 16
    path.write_bytes(content)
    with pytest.raises(CampaignError, match="damaged"):
        Store(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CampaignError, match="damaged"):
        Store(path)


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "c.sqlite"
    Store.create(path, SIMPLE, IDENTITY, 7).close()
    database = sqlite3.connect(path)
    database.execute("pragma user_version = 7")
    database.close()
    with pytest.raises(CampaignError, match="has schema 7, this version of rom reads 1"):
        Store(path)


def write_and_report(path, pipe):
    with Store.create(path, SIMPLE.extended(600), IDENTITY, 3) as store:
        pipe.send("made")
        for block in range(len(store.blocks)):
            store.add(block, made_up(store.plan, store.blocks[block]))
            pipe.send(block)


@pytest.mark.parametrize("moment", [0, 1, 20, 63])
def test_killed_at_any_moment(moment, tmp_path):
    """What was reported is there, in whole blocks; the next writer goes on."""
    path, (ours, theirs) = tmp_path / "c.sqlite", multiprocessing.Pipe(duplex=False)
    writer = multiprocessing.get_context("fork").Process(target=write_and_report, args=(path, theirs))
    writer.start()
    theirs.close()
    reported = [ours.recv() for _ in range(moment + 1)]
    writer.kill()
    with contextlib.suppress(EOFError):
        while True:
            reported.append(ours.recv())
    writer.join()
    reported.remove("made")
    assert len(campaign.read(path).table) % 3 == 0  # a reader finds it as it is
    with Store(path, write=True) as store:
        done = store.done().tolist()
        assert done[: len(reported)] == reported and len(reported) <= len(done) <= len(reported) + 1
        fill(store, range(len(done), len(store.blocks)))
        assert store.results().table.tobytes() == made_up(store.plan, np.arange(600)).tobytes()


def test_export(tmp_path):
    with Store.create(tmp_path / "c.sqlite", STRATIFIED, IDENTITY, 7) as store:
        fill(store, [0])
        results = store.results()
        words = store._database.execute("select layer, bits from results join strata using (stratum)").fetchall()
    assert len(words) == 7 and set(words) <= {("a", "23,30"), ("b", "23,30"), ("c", "23,30")}
    results.export(tmp_path / "c.csv")
    with open(tmp_path / "c.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["position"]) for row in rows] == results.table["position"].tolist()
    assert [float(row["delta_loss"]) for row in rows] == results.table["delta_loss"].tolist()
    assert {row["target"] for row in rows} == {"output"}
    with pytest.raises(CampaignError, match=r"\.csv or \.parquet"):
        results.export(tmp_path / "c.xls")


def test_export_of_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    with Store.create(tmp_path / "c.sqlite", STRATIFIED, IDENTITY, 7) as store:
        fill(store)
        store.results().export(tmp_path / "c.parquet")
    table = parquet.read_table(tmp_path / "c.parquet")
    assert table["old"].to_pylist() == made_up(STRATIFIED, np.arange(60))["old"].tolist()


def test_examples(run_doctests):
    run_doctests(blocks)
