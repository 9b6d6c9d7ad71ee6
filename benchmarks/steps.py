"""Steps of a long report: commands with time limits whose outcomes are kept as they come, so that a run cut short loses
nothing and the next one goes on where it stopped. Imports nothing that must be built first."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from checkout import VARIABLE

JOURNAL = "report.jsonl"
MIN_SECONDS = 2  # a step with less time than this is left for the next run


@dataclass(frozen=True)
class Step:
    """A command of a part.

    unavailable: why it cannot run here; empty: it can. impossible: a pattern of its log that says the same, found out
    only by trying. weight: its share of the part's time beside the steps after it. kept: its result is in OUT; else on
    the machine, so that it runs in every call.
    """

    name: str
    command: Sequence[str]
    folder: Path
    environment: tuple[tuple[str, str], ...] = ()
    unavailable: str = ""
    impossible: str = ""
    weight: float = 1
    kept: bool = True


@dataclass
class Outcome:
    """A line of report.jsonl. `last` is the last line the step printed."""

    part: str
    step: str
    status: str  # passed, failed, timeout, skipped
    seconds: float
    reason: str
    gpu: str
    commit: str
    last: str = ""

    def settles(self, part: str, step: Step, gpu: str, commit: str) -> bool:
        """Whether a later run need not repeat the step: it ended, on this kind of GPU, from this source."""
        same = (self.part, self.step, self.gpu, self.commit) == (part, step.name, gpu, commit)
        return same and step.kept and self.status in ("passed", "failed")


@dataclass
class Journal:
    """OUT, what is known there, and the file OUT is packed into after every step, if any."""

    out: Path
    gpu: str
    commit: str
    archive: Path | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        path, known = self.out / JOURNAL, {f.name for f in fields(Outcome)}
        for line in path.read_text().splitlines() if path.exists() else []:
            self.outcomes.append(Outcome(**{k: v for k, v in json.loads(line).items() if k in known}))

    def settled(self, part: str, step: Step) -> bool:
        """Whether an earlier run did the step."""
        return any(outcome.settles(part, step, self.gpu, self.commit) for outcome in self.outcomes)

    def add(self, outcome: Outcome) -> None:
        """Keeps an outcome, at once."""
        self.outcomes.append(outcome)
        with open(self.out / JOURNAL, "a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        print(
            f"{outcome.part:10} {outcome.step:14} {outcome.status:8} {outcome.seconds:6.1f} s  "
            f"{outcome.reason or outcome.last}",
            flush=True,
        )
        self.write_summary()
        if self.archive:
            pack(self.out, self.archive)

    def write_summary(self) -> None:
        """OUT/report.md: the newest outcome of every step, then the tables of the benchmarks."""
        newest = {(o.part, o.step): o for o in self.outcomes}.values()
        lines = [f"GPU: {self.gpu or 'none'}, commit {self.commit}", ""]
        lines += ["| part | step | status | seconds | what it said |", "|---|---|---|---|---|"]
        said = [(o, (o.reason or o.last).replace("|", "\\|")) for o in newest]
        lines += [f"| {o.part} | {o.step} | {o.status} | {o.seconds} | {text} |" for o, text in said]
        tables = [path.read_text() for path in sorted(self.out.glob("*.md")) if path.name != "report.md"]
        (self.out / "report.md").write_text("\n".join(lines) + "\n\n" + "\n".join(tables))


def run(part: str, step: Step, journal: Journal, limit: float) -> Outcome:
    """Runs a step for at most `limit` seconds, its output going to OUT/PART_STEP.log, and enters it in the journal."""
    start, reason = time.perf_counter(), step.unavailable if journal.gpu else "no NVIDIA GPU is visible to torch"
    status, last = "skipped" if reason else "failed", ""
    if not reason:
        path = journal.out / f"{part}_{step.name}.log"
        environment = os.environ | {VARIABLE: journal.commit, "PYTHONUNBUFFERED": "1"} | dict(step.environment)
        code = _execute(step, path, environment, limit)
        text = path.read_text(errors="replace")
        last = _last_line(text)
        if code is None:
            status, reason = "timeout", f"cut off after {limit:.0f} s, after {last!r}: see {path.name}"
        elif step.impossible and (found := re.search(step.impossible, text)):
            status, reason = "skipped", f"this machine does not allow it ({found[0]!r}): see {path.name}"
        else:
            status = "failed" if code else "passed"
            reason = f"exit code {code}, {last!r}: see {path.name}" if code else ""
    seconds = round(time.perf_counter() - start, 1)
    outcome = Outcome(part, step.name, status, seconds, reason, journal.gpu, journal.commit, last)
    journal.add(outcome)
    return outcome


def _execute(step: Step, log: Path, environment: dict[str, str], limit: float) -> int | None:
    """The exit code, or None when time was up; then everything the command started is stopped with it."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            step.command, cwd=step.folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def run_part(part: str, steps: Sequence[Step], journal: Journal, stop: float, again: bool) -> bool:
    """Runs the steps of a part until `stop` (of `time.perf_counter`), later steps keeping their share of the time.

    False when there was too little time for one of them: it is left for the next run.
    """
    wanted = [step for step in steps if again or not journal.settled(part, step)]
    if len(wanted) < len(steps):
        done = ", ".join(step.name for step in steps if step not in wanted)
        print(f"{part:10} done in an earlier run: {done}; --again repeats", flush=True)
    for i, step in enumerate(wanted):
        remaining = stop - time.perf_counter()
        if remaining < MIN_SECONDS:
            print(f"{part:10} {step.name:14} left for the next run", flush=True)
            return False
        share = step.weight / sum(later.weight for later in wanted[i:])
        run(part, step, journal, remaining * share)
    return True


def pack(out: Path, archive: Path) -> None:
    """OUT as one file, replaced whole; without the peers' modules, which are larger than all results."""
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz") as file:
        for path in sorted(out.iterdir()):
            if path.is_file() and path not in (archive, partial):
                file.add(path, path.name)
    os.replace(partial, archive)


def unpack(archive: Path, out: Path) -> None:
    """Goes on where the run that packed `archive` stopped."""
    with tarfile.open(archive) as file:
        file.extractall(out, filter="data")
