"""The Flower app deployed as it would be: a SuperLink, two SuperNodes and `flwr run`, on the loopback interface."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rom.models import fedfd

pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("flwr"), reason="Flower is not installed"),
]
APP = Path(__file__).parents[2] / "examples" / "flower"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(name):
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not beside {sys.executable}"
    return found


@contextmanager
def running(folder, environment, name, *arguments):
    """A command in its own process group, which is ended with all its children."""
    with open(folder / f"{name}-{time.monotonic_ns()}.log", "w") as log:
        process = subprocess.Popen(
            [command(name), *map(str, arguments)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for end in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, end)
                    process.wait(timeout=10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the deployment did not get there in time; its logs are in the test's folder"
        time.sleep(1)


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_superlink_and_supernodes_equal_the_in_process_engine(tmp_path):
    link, nodes = free_port(), (free_port(), free_port())
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # Flower starts its own commands by name
    environment = {**os.environ, "PATH": path, "FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment["FLWR_TELEMETRY_ENABLED"] = "0"
    settings = fedfd.Settings(
        groups=(fedfd.Group("mlp"), fedfd.Group("cnn")),
        clients=2,
        rounds=2,
        local_epochs=1,
        distillation=fedfd.Distillation(**fedfd.METHODS["fedfd"]),
    )
    asked = f'groups="mlp,cnn" clients=2 rounds=2 local-epochs=1 out="{tmp_path}"'
    split, checkpoint = fedfd.split(fedfd.digits(), seed=0), tmp_path / "checkpoint.safetensors"
    deployed, expected = fedfd.Federation(split, settings), fedfd.Federation(split, settings)

    def finished():
        if checkpoint.exists():
            deployed.load(checkpoint)
        return deployed.round == settings.rounds

    def node(client):
        return (
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", nodes[client],
            "--node-config", f"partition-id={client} num-partitions=2",
        )  # fmt: skip

    superlink = ("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", link)
    with running(tmp_path, environment, *superlink, "--disable-runtime-dependency-installation"):
        wait_for(lambda: listens(link), 60)
        with running(tmp_path, environment, *node(0)), running(tmp_path, environment, *node(1)):
            run = [command("flwr"), "run", str(APP), "loopback", "--run-config", asked]
            subprocess.run(run, env=environment, check=True, timeout=60, capture_output=True)
            wait_for(finished, 400)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected.run()
    finally:
        torch.set_num_threads(threads)
    assert deployed.history == expected.history
    for group in settings.groups:
        state = deployed.state(group)
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state(group).items())
