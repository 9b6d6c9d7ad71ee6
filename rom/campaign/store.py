"""A campaign in one file: an SQLite database that is whole at every moment, whatever kills its writer.

Tables: `results` (a row per fault, columns of RESULT), `strata` (what the numbers in it mean), `blocks` (what is done),
`meta` (plan, fingerprints, options, the golden run). A block's row and its results are one transaction, on the disk
before `add` returns. Anyone may read while one process writes: `sqlite3 campaign.sqlite 'select …'`, or `read`.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from rom import files
from rom.campaign.blocks import Blocks, Counts, starts
from rom.campaign.errors import CampaignError
from rom.campaign.records import RESULT
from rom.faults import FaultPlan, Stratum

SCHEMA = 1  # raised whenever the tables or their meaning change
APPLICATION = 0x526F4D43  # "RoMC" in the header of the file, so that other databases are not mistaken for a campaign
_COLUMNS = ", ".join(RESULT.names or ())
_TYPES = ", ".join(f"{name} {'real' if RESULT[name].kind == 'f' else 'integer'}" for name in RESULT.names or ())
_TABLES = f"""
create table meta (key text primary key, value) without rowid;
create table strata (stratum integer primary key, layer text, target text, dtype text, kind text, bits text,
                     size integer);
create table blocks (block integer primary key, faults integer not null, seconds real not null);
create table results ({_TYPES.replace("position integer", "position integer primary key")});
"""


@dataclass(frozen=True)
class Results:
    """What a store holds, read at one moment.

    Attributes:
        table: RESULT [n], one row per fault done, by position in the plan.
        plan: whose faults they are; `plan.strata[row["stratum"]]` says layer, target and bits.
        golden: of the run without faults: "samples", "accuracy", "loss", "top2_difference".
        identity: fingerprints and the options that decide results.
    """

    table: np.ndarray
    plan: FaultPlan
    golden: dict[str, Any]
    identity: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether every fault of the plan is there."""
        return len(self.table) == len(self.plan)

    def columns(self) -> dict[str, Any]:
        """The table by columns, with each fault's layer, target and bits: `pandas.DataFrame(results.columns())`."""
        names = ("layer", "target", "dtype", "kind", "bits")
        nothing = dict.fromkeys(names, "")  # number −1: a realisation of a rate that hit nothing
        strata = [*(_described(s) for s in self.plan.strata), nothing]
        words = {name: [strata[h][name] for h in self.table["stratum"]] for name in names}
        return {name: self.table[name] for name in RESULT.names or ()} | words

    def export(self, path: str | Path) -> None:
        """Writes `columns()` as .csv, or as .parquet where pyarrow is installed.

        CampaignError: another suffix, or no pyarrow.
        """
        path, columns = Path(path), self.columns()
        if path.suffix == ".csv":
            with files.replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(columns)
                rows.writerows(zip(*(c.tolist() if isinstance(c, np.ndarray) else c for c in columns.values())))
        elif path.suffix == ".parquet":
            try:
                from pyarrow import parquet, table  # noqa: PLC0415 - neither an extra of ours nor needed otherwise
            except ImportError as error:
                raise CampaignError(f"writing {path} needs pyarrow: `pip install pyarrow`, or give a .csv.") from error
            with files.replacing(path) as partial:
                parquet.write_table(table(columns), partial)
        else:
            raise CampaignError(f"expected a file ending in .csv or .parquet, got {path}.")


def read(path: str | Path) -> Results:
    """Everything in a store, also of a campaign that is running. CampaignError: it cannot be read."""
    with Store(path) as store:
        return store.results()


class Store:
    """The file of a campaign; a context manager. Made by `Store.create`; opened for reading unless `write`.

    CampaignError, naming the file and what to do: it is not there, is damaged, is no campaign, was written by another
    schema, or another process writes to it; in writing, the disk is full.
    """

    def __init__(self, path: str | Path, *, write: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CampaignError(f"there is no campaign at {self.path}. Start one with `rom campaign run`.")
        self._open(write)
        try:
            if not self._is_campaign():
                raise CampaignError(f"{self.path} is not a campaign: it is empty. Start one with `rom campaign run`.")
            self._load()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        path: str | Path,
        plan: FaultPlan,
        identity: Mapping[str, Any],
        block_size: int,
        golden: Mapping[str, Any] | None = None,
        stages: Sequence[Counts] = (),
    ) -> Store:
        """A new campaign, open for writing. Nobody sees it half made.

        identity: JSON values; all that decides results beside the faults. stages: of `Blocks`; none for a plan that
        was not extended. CampaignError: there is one already.
        """
        store = cls.__new__(cls)
        store.path = Path(path)
        store._open(write=True)
        try:
            if store._is_campaign():
                raise CampaignError(f"{path} holds a campaign already. Resume it, or give another file.")
            with store._transaction():
                for statement in _TABLES.split(";")[:-1]:
                    store._database.execute(statement)
                store._write_plan(plan, stages or [plan.counts])
                store.set("identity", dict(identity))
                store.set("block_size", block_size)
                store.set("golden", dict(golden or {}))
                store._database.execute(f"pragma user_version = {SCHEMA}")
                store._database.execute(f"pragma application_id = {APPLICATION}")
            store._load()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Whether there is a campaign; False as well for what a process left that was killed before it made one."""
        store = cls.__new__(cls)
        store.path = Path(path)
        if not store.path.exists():
            return False
        store._open(write=False)
        try:
            return store._is_campaign()
        finally:
            store.close()

    # ------------------------------------------------------------------------------------------------ what is in it
    plan: FaultPlan
    blocks: Blocks
    identity: dict[str, Any]
    golden: dict[str, Any]

    def done(self) -> np.ndarray:
        """Numbers of the blocks that are done, ascending."""
        with self._explained():
            rows = self._database.execute("select block from blocks order by block").fetchall()
        return np.array([row[0] for row in rows], np.int64)

    def stages(self) -> list[Counts]:
        """The plan's counts when the campaign began and after each extension."""
        return [tuple(counts) for counts in self.get("stages")]

    def seconds(self) -> float:
        """Time the blocks took, summed over everyone who worked on them."""
        with self._explained():
            return self._database.execute("select total(seconds) from blocks").fetchone()[0]

    def get(self, key: str) -> Any:
        """A value of the table `meta`; None where there is none."""
        with self._explained():
            row = self._database.execute("select value from meta where key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def results(self) -> Results:
        """All results, as `read` returns them."""
        with self._explained():
            # One statement, so that it sees one moment; SQLite has no NaN and gives null for it.
            rows = self._database.execute(f"select {_COLUMNS} from results order by position")
            rows.row_factory = lambda _, row: tuple(np.nan if value is None else value for value in row)
            table = np.fromiter(rows, RESULT)
        return Results(table, self.plan, self.golden, self.identity)

    # ------------------------------------------------------------------------------------------------ writing
    def add(self, block: int, results: np.ndarray, seconds: float = 0.0) -> None:
        """Stores the results (RESULT) of all faults of a block; they are on the disk when this returns."""
        expected = self.blocks[block]
        if results.dtype != RESULT or not np.array_equal(np.sort(results["position"]), np.sort(expected)):
            raise ValueError(f"rom.campaign.Store.add: expected the results of the {len(expected)} faults of {block}.")
        marks = ", ".join("?" * len(RESULT.names or ()))
        with self._transaction():
            self._database.execute("insert into blocks values (?, ?, ?)", (block, len(results), seconds))
            self._database.executemany(f"insert into results values ({marks})", results.tolist())

    def set(self, key: str, value: Any) -> None:
        """Writes a JSON value into the table `meta`."""
        with self._explained():
            self._database.execute("insert or replace into meta values (?, ?)", (key, json.dumps(value)))

    def extend(self, plan: FaultPlan) -> None:
        """Goes over to an extension of the plan (`FaultPlan.extended`); what is done stays done.

        CampaignError: it is no extension of the plan here.
        """
        if plan.counts == self.plan.counts:
            return
        if any(new < old for new, old in zip(plan.counts, self.plan.counts)):
            raise CampaignError(
                f"{self.path} holds a campaign of {len(self.plan)} faults, got a plan of {len(plan)}: expected its "
                "own plan or a longer one."
            )
        stages = self.stages()
        with self._transaction():
            if plan.scheme == "stratified":  # its positions count through the strata, so longer strata push later ones
                shift = starts(plan.counts) - starts(self.plan.counts)
                moves = [(int(by), h) for h, by in enumerate(shift)]
                # By way of negative numbers: a position may be taken by a fault that has yet to move.
                self._database.executemany("update results set position = -1 - (position + ?) where stratum = ?", moves)
                self._database.execute("update results set position = -1 - position")
            self._write_plan(plan, [*stages, plan.counts])
        self._load()

    def merge(self, other: Store) -> int:
        """Adds what another store of the same campaign has done; returns how many faults that were.

        CampaignError: it is another campaign, or both have a block and disagree on it.
        """
        self.check(other.identity, str(other.path))
        if other.stages() != self.stages() or other.blocks.size != self.blocks.size:
            raise CampaignError(
                f"{self.path} and {other.path} differ in their blocks: {len(self.plan)} faults in blocks of "
                f"{self.blocks.size} here, {len(other.plan)} in blocks of {other.blocks.size} there."
            )
        theirs, ours = other.results().table, self.results().table
        done, added = set(self.done().tolist()), 0
        for block in other.done().tolist():
            found = _rows(theirs, self.blocks[block])
            if block not in done:
                self.add(block, found)
                added += len(found)
            elif found.tobytes() != _rows(ours, self.blocks[block]).tobytes():
                raise CampaignError(
                    f"{self.path} and {other.path} both have block {block} and disagree on it. They were run on "
                    "different machines or versions: merge one of them only."
                )
        return added

    def check(self, identity: Mapping[str, Any], whose: str = "this run") -> None:
        """CampaignError naming both values when something that decides results differs from what this store has."""
        identity = json.loads(json.dumps(identity))
        for key in [*self.identity, *(key for key in identity if key not in self.identity)]:
            ours, theirs = self.identity.get(key), identity.get(key)
            if ours != theirs:
                raise CampaignError(
                    f"{self.path} is a campaign with another {key}: it has {ours}, {whose} has {theirs}. "
                    "Give the same, or another file."
                )

    # ------------------------------------------------------------------------------------------------ the database
    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets another process write to it."""
        if self._lock is not None:
            with suppress(sqlite3.Error):  # a reader is there: then it stays as it is
                # One file again, without the log beside it, that can be copied and read from anywhere.
                self._database.execute("pragma journal_mode = delete")
        self._database.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    _lock: _Lock | None
    _database: sqlite3.Connection

    def _open(self, write: bool) -> None:
        self._lock = _Lock(self.path) if write else None
        # A reader may have to take back the half-written change of a killed writer, so it gets to write where it can.
        mode = "rwc" if write else "rw" if os.access(self.path, os.W_OK) else "ro"
        try:
            with self._explained():
                self._database = sqlite3.connect(
                    f"file:{quote(str(self.path))}?mode={mode}", uri=True, isolation_level=None, timeout=60
                )
                if not write:
                    self._database.execute("pragma query_only = on")
                else:
                    self._database.execute("pragma journal_mode = wal")  # readers and the writer do not wait
                    self._database.execute("pragma synchronous = full")  # done survives a power cut as well as kill -9
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def _is_campaign(self) -> bool:
        """False: no tables yet."""
        with self._explained():
            tables, application, schema = (
                self._database.execute(query).fetchone()[0]
                for query in ("select count(*) from sqlite_master", "pragma application_id", "pragma user_version")
            )
        if not tables:
            return False
        if application != APPLICATION:
            raise CampaignError(f"{self.path} is a database of something else, not a campaign. Give another file.")
        if schema != SCHEMA:
            raise CampaignError(
                f"{self.path} has schema {schema}, this version of rom reads {SCHEMA}. Use the version that wrote it."
            )
        return True

    def _load(self) -> None:
        with self._explained():
            health = self._database.execute("pragma quick_check(1)").fetchone()[0]
            counted = self._database.execute(
                "select (select count(*) from results), (select total(faults) from blocks)"
            ).fetchone()
            content = self._database.execute("select value from meta where key = 'plan'").fetchone()[0]
        if health != "ok" or counted[0] != counted[1]:
            raise CampaignError(f"{self.path} is damaged ({health}). Take a copy of it, or start anew in another file.")
        self.plan = FaultPlan.from_bytes(content, str(self.path))
        self.blocks = Blocks(self.plan, self.get("block_size"), self.stages())
        self.identity, self.golden = self.get("identity"), self.get("golden")

    def _write_plan(self, plan: FaultPlan, stages: Sequence[Counts]) -> None:
        self._database.execute("insert or replace into meta values ('plan', ?)", (plan.to_bytes(),))
        self.set("stages", stages)
        rows = [(h, *_described(s).values()) for h, s in enumerate(plan.strata)]
        self._database.executemany("insert or replace into strata values (?, ?, ?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._database.execute("begin immediate")
            try:
                yield
                self._database.execute("commit")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("rollback")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if "full" in text:
                remedy = "What was done before is safe: make room and resume."
            elif "not a database" in text or "malformed" in text:
                remedy = "It is damaged or no campaign: take a copy of it, or give another file."
            elif "readonly" in text or "unable to open" in text:
                remedy = "Check that the folder exists and can be written to."
            else:
                remedy = "What was done before is safe: resume when the cause is gone."
            raise CampaignError(f"{self.path}: {text}. {remedy}") from error


class _Lock:
    """A lock on a file beside the store; the kernel lifts it when its owner dies.

    Not on the store itself: SQLite's own locks are there, and closing a second descriptor would lift them.
    """

    def __init__(self, store: Path) -> None:
        self.path = store.with_name(f"{store.name}.lock")
        while True:
            try:
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise CampaignError(f"cannot write to {store} ({error.strerror}). Give another file.") from error
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.exists(self.path) and os.path.samestat(os.fstat(self.descriptor), os.stat(self.path)):
                    return
            except BlockingIOError as error:
                os.close(self.descriptor)
                raise CampaignError(
                    f"another process is writing to {store}. Wait for it, or stop it; it loses nothing."
                ) from error
            os.close(self.descriptor)  # its last owner has just removed it: that lock keeps nobody else out

    def release(self) -> None:
        """Lets others write."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _described(stratum: Stratum) -> dict[str, Any]:
    return {
        "layer": stratum.layer,
        "target": stratum.target.name.lower(),
        "dtype": stratum.dtype,
        "kind": stratum.kind,
        "bits": ",".join(map(str, stratum.bits)),
        "size": stratum.size,
    }


def _rows(table: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The rows of these positions; the table is ordered by them."""
    return table[np.searchsorted(table["position"], np.sort(positions))]
