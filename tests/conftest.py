"""What all tests share: outputs poisoned before a kernel runs, a seed, and threads restored."""

import doctest

import hypothesis
import pytest
import torch

import rom
from rom import native

# The same examples in every run: a gate must not fail by luck. `--hypothesis-profile=explore` draws new ones.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)
hypothesis.settings.load_profile("gate")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Everything a kernel must write starts as NaN (integers: a huge negative number), so nothing is left unwritten."""
    empty = native.empty

    def poisoned(shape, dtype, device):
        out = empty(shape, dtype, device)
        return out.fill_(float("nan") if dtype.is_floating_point else 255 if dtype == torch.uint8 else -(2**30))

    monkeypatch.setattr(native, "empty", poisoned)


@pytest.fixture(autouse=True)
def restored_state():
    """Every test starts from seed 0 and leaves torch's thread count as it found it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The CPU always; an NVIDIA GPU under `pytest -m gpu`."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is visible")
    return torch.device(request.param)


@pytest.fixture
def run_doctests():
    """Runs the examples of a module's docstrings with `rom` and `torch` at hand."""

    def run(module):
        failed, attempted = doctest.testmod(
            module, extraglobs={"rom": rom, "torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE
        )
        assert failed == 0 and attempted > 0, f"{module.__name__}: {failed} of {attempted} examples failed"

    return run
