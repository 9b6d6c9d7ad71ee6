"""The thread pool: forked children, several callers, and results that do not depend on the number of threads."""

import os
import select
import signal
import threading
import time

import pytest
import torch

import rom

SHAPE = (2, 600, 256)  # several tasks, and enough work that helpers are woken


def work(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator).requires_grad_()
    weight = torch.randn(SHAPE[-1], 4, generator=generator).requires_grad_()
    y, _ = rom.ops.add_rms_norm(x, torch.ones(SHAPE[-1]))
    out = rom.ops.causal_conv1d(y, weight, None, "silu")
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))]


def forward_only(seed=0):
    """Without autograd, whose threads do not survive a fork."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SHAPE, generator=generator)
        return rom.ops.causal_conv1d(x, torch.ones(SHAPE[-1], 4), None, "silu")


def forward_in_child(seed=0):
    """In a forked child torch's OpenMP pool hangs beyond one thread; ours is asked for two all the same."""
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 2  # in this process only
    return forward_only(seed)


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return forward_in_child(index)


def in_child(function, seconds=20):
    """Runs `function` in a forked child and returns whether it answered True; a hanging child is killed and fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"1" if function() else b"0")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
            pytest.fail(f"the forked child gave no answer within {seconds} s")
        return os.read(reader, 1) == b"1"
    finally:
        os.close(reader)
        os.waitpid(child, 0)


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


def test_a_forked_child_uses_the_ops():
    expected = forward_only()
    assert in_child(lambda: torch.equal(forward_in_child(), expected))
    assert torch.equal(forward_only(), expected)  # and the parent's pool still works


def test_a_child_of_a_child_uses_the_ops():
    expected = forward_only()

    def child():
        return torch.equal(forward_in_child(), expected) and in_child(
            lambda: torch.equal(forward_in_child(), expected), 10
        )

    assert in_child(child)


def test_fork_while_another_thread_is_in_a_kernel():
    """The child must not inherit a lock the other thread was holding."""
    expected, stop = forward_only(), threading.Event()

    def busy():
        while not stop.is_set():
            forward_only()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            time.sleep(0.003)
            assert in_child(lambda: torch.equal(forward_in_child(), expected))
    finally:
        stop.set()
        thread.join()


def test_data_loader_worker():
    expected = forward_only(0)
    loader = torch.utils.data.DataLoader(
        Items(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=20
    )
    items = list(loader)
    assert len(items) == 3 and torch.equal(items[0], expected)


def test_two_python_threads_at_once():
    expected = [work(seed) for seed in range(2)]
    results = {}

    def caller(seed):
        results[seed] = [work(seed) for _ in range(5)]

    threads = [threading.Thread(target=caller, args=(seed,), daemon=True) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2, "a caller hangs"
    for seed in range(2):
        assert all(torch.equal(g, e) for run in results[seed] for g, e in zip(run, expected[seed]))


def test_results_do_not_depend_on_the_number_of_threads():
    runs = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        runs.append(work())
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))
