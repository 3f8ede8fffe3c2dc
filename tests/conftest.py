"""What every test gets: its share of the cores, the same seed, a matplotlib without a screen."""

import logging
import os

import pytest
import torch
from torch.autograd import forward_ad

from tests.each import seed_all

os.environ.setdefault("MPLBACKEND", "Agg")
# pytest listens to every logger, and torch then formats each step of torch.export: ten times slower
logging.getLogger("torch.__trace").disabled = True
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = os.environ.get("OMP_NUM_THREADS", "")  # as `python -m tests.processors` sets it
torch.set_num_threads(int(_THREADS) if _THREADS else max(1, (os.cpu_count() or 1) // _WORKERS))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed every generator, so that a test does not depend on the tests before it."""
    seed_all()
    return 0


def _global_state():
    switches = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return *switches, *modes, forward_ad._current_level


@pytest.fixture(autouse=True)
def _clean_defaults():
    """Fail a test that leaves torch's global state changed for the tests after it."""
    state = _global_state()
    yield
    left = _global_state()
    assert left == state, f"the test left torch's global state at {left}, it was {state}"


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    """Both precisions that the library promises."""
    return request.param
