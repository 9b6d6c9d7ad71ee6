"""Workers on Ray: the table of one process, whoever dies."""

import contextlib
import os
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from rom import campaign, faults
from rom.campaign import CampaignError, shards

FAULTS = 7000  # of the test with real nodes: enough work for something to die in


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(5)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)).eval()
    inputs = torch.randn(12, 6)
    plan = faults.FaultPlan.simple(faults.survey(model, inputs).strata(12), 600, seed=3)
    return model, plan, inputs, model(inputs).argmax(1)


def go(subject, path, **options):
    torch.set_num_threads(1)
    options = {"block_size": 20, "progress": False} | options
    return campaign.run(*subject, store=path, **options)


@pytest.fixture(scope="module")
def whole(subject, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "c.sqlite"
    go(subject, path)
    return campaign.read(path).table.tobytes()


# ------------------------------------------------------------------------------------------------ without Ray
class Task:
    def __init__(self, call):
        self.call = call


class FakeRay(types.ModuleType):
    """As much of Ray as is used, in this process; `dies(worker, method, argument)` says who does."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def as_instanceof_cause(self):
                return self.__cause__

    def __init__(self, dies=lambda *_: False):
        super().__init__("ray")
        self.dies, self.workers, self.killed, self.up, self.options = dies, 0, 0, False, None
        self.random = random.Random(0)

    def is_initialized(self):
        return self.up

    def init(self, address, **_):
        if address == "auto" and self.dies is None:
            raise ConnectionError("no cluster\nand more")
        self.up = True

    def shutdown(self):
        self.up = False

    def put(self, thing):
        return thing

    def kill(self, worker):
        self.killed += 1

    def wait(self, tasks, num_returns, timeout):
        ready = self.random.choice(tasks)  # an order nobody may rely on
        return [ready], [task for task in tasks if task is not ready]

    def get(self, task):
        worker, name, given = task.call
        if self.dies(worker.number, name, given[0]):
            raise self.exceptions.RayError("the worker died.\nIts log: …")
        try:
            return getattr(worker.actor, name)(*given)
        except ValueError as error:
            raise self.exceptions.RayTaskError("a traceback") from error

    def remote(self, **options):
        self.options, ray = options, self

        class Handle:
            def __init__(self, actor):
                self.actor, self.number = actor, ray.workers
                ray.workers += 1

            def __getattr__(self, name):
                return types.SimpleNamespace(remote=lambda *given: Task((self, name, given)))

        return lambda kind: types.SimpleNamespace(remote=lambda: Handle(kind()))


@pytest.fixture
def fake(monkeypatch):
    def install(*given):
        ray = FakeRay(*given)
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return install


def test_many_workers_are_one_process(fake, subject, whole, tmp_path):
    ray = fake()
    assert go(subject, tmp_path / "c.sqlite", ray="auto", shards=3).state == "complete"
    assert campaign.read(tmp_path / "c.sqlite").table.tobytes() == whole
    assert (ray.workers, ray.killed, ray.up) == (3, 3, False) and ray.options["num_gpus"] == 0


def test_blocks_of_dead_workers_run_again(fake, subject, whole, tmp_path):
    deaths = []

    def dies(worker, method, argument):
        event = worker if method == "start" else -argument[0]
        if event in (1, 0, -200, -400) and event not in deaths:
            deaths.append(event)
            return True
        return False

    ray = fake(dies)
    go(subject, tmp_path / "c.sqlite", ray="auto", shards=2)
    assert len(deaths) == 4 and ray.workers == 2 + 4
    assert campaign.read(tmp_path / "c.sqlite").table.tobytes() == whole


def test_a_block_that_kills_everyone_ends_it(fake, subject, whole, tmp_path):
    path = tmp_path / "c.sqlite"
    fake(lambda worker, method, argument: method == "run" and argument[0] == 140)
    with pytest.raises(CampaignError, match=r"3 workers died in block 7 \(the last: the worker died\.\)"):
        go(subject, path, ray="auto")
    fake()
    assert go(subject, path, ray="auto", resume=True).state == "complete"
    assert campaign.read(path).table.tobytes() == whole
    fake(lambda worker, method, argument: method == "start")
    with pytest.raises(CampaignError, match="3 workers died in starting"):
        go(subject, tmp_path / "d.sqlite", ray="auto")


def test_stopping_and_interrupting_among_workers(fake, subject, whole, tmp_path, monkeypatch):
    stop = campaign.Stop(0.1, first=40)
    alone = go(subject, tmp_path / "a.sqlite", stop=stop)
    fake()
    assert alone.state == "stopped" and go(subject, tmp_path / "b.sqlite", stop=stop, ray="auto").done == alone.done
    tables = [campaign.read(tmp_path / name).table.tobytes() for name in ("a.sqlite", "b.sqlite")]
    assert tables[0] == tables[1]

    add = campaign.Store.add

    interrupts = iter([signal.SIGINT])  # one: a second would act at once

    def interrupted(*given):
        add(*given)
        for number in interrupts:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(campaign.Store, "add", interrupted)
        summary = go(subject, tmp_path / "c.sqlite", ray="auto", shards=3)
    assert summary.state == "interrupted" and 20 <= summary.done <= 60  # those under way were finished and kept


def test_errors_of_workers(fake, subject, tmp_path, monkeypatch):
    path = tmp_path / "c.sqlite"
    fake(None)
    for address, message in [("auto", "no cluster"), ("127.0.0.1:1", ".*refused")]:
        with pytest.raises(CampaignError, match=rf"cannot reach a Ray cluster at '{address}' \({message}\)"):
            go(subject, path, ray=address)
    fake()
    model, plan, inputs, labels = subject
    with pytest.raises(ValueError, match="samples"):  # of the engine, as if it were here
        go((model, plan, inputs[:5], labels[:5]), path, ray="auto")
    start = shards._Worker.start
    for differs, message in [
        ({"torch": "1.0"}, "a Ray worker has torch 1.0"),
        ({"logits": "x"}, "machines of one kind"),
    ]:
        answers = iter([{}, differs])
        with monkeypatch.context() as patch:
            patch.setattr(shards._Worker, "start", lambda *given, more=answers: start(*given) | next(more))
            with pytest.raises(CampaignError, match=message):
                go(subject, path, ray="auto")
        path.unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CampaignError, match=r"rom-kernels\[campaign\]"):
        go(subject, path, ray="auto")


# ------------------------------------------------------------------------------------------------ with Ray
def workers_of(node):
    """Process numbers of the workers on a node: children of its raylet."""
    raylet, found = node.all_processes["raylet"][0].process.pid, []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            name = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
            if (
                name.startswith(b"ray::_Worker")
                and int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == raylet
            ):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_two_nodes_one_of_which_dies(subject, tmp_path):
    """Four workers on two nodes of a cluster on loopback; one worker is killed, then the other node."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    model, _, inputs, labels = subject
    strata = faults.survey(model, inputs).strata(12, [faults.Target.OUTPUT, faults.Target.B])
    subject = model, faults.FaultPlan.simple(strata, FAULTS, seed=3), inputs, labels
    go(subject, tmp_path / "one.sqlite")
    path, seen = tmp_path / "c.sqlite", {}

    def disturb():
        while not campaign.Store.exists(path) or len(campaign.read(path).table) < FAULTS // 10:
            time.sleep(0.02)
        seen["workers"] = [workers_of(node) for node in (head, second)]
        os.kill(seen["workers"][0][0], signal.SIGKILL)
        cluster.remove_node(second, allow_graceful=False)
        seen["done"] = len(campaign.read(path).table)

    thread = threading.Thread(target=disturb)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        head, second = cluster.head_node, cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        thread.start()
        summary = go(subject, path, ray="auto", shards=4)
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert summary.state == "complete" and all(seen["workers"]) and seen["done"] < FAULTS
    tables = [campaign.read(tmp_path / name).table.tobytes() for name in ("one.sqlite", "c.sqlite")]
    assert tables[0] == tables[1]
