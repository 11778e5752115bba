"""What all tests share: one core for each process, a printed seed, the tiny model."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.gpu_checks.thinned_tests import thinned
from tools.tiny_model.cache import TinyModel, ensure_tiny_model

# Read when torch or numpy is imported, here and in every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
# Read when Triton is imported, which transformers does: without a GPU, kernels are interpreted.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of tests that draw random numbers")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before pytest looks at the marks: what a machine without a GPU skips, and does when asked."""
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needing_gpu and not _cuda_is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "TRITON_INTERPRET" in os.environ:
        # Those that are skipped have no part in it: a value would occur in none that runs.
        to_thin = [
            item
            for item in items
            if item.get_closest_marker("thinned") and not item.get_closest_marker("gpu")
        ]
        kept = set(thinned(to_thin))
        for item in to_thin:
            if item not in kept:
                item.add_marker(pytest.mark.long)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if before := os.environ.get("SIDESTREAM_CHECK_BEFORE"):
        terminalreporter.section("tests that ran before")
        terminalreporter.write_line(before)
    if failed := os.environ.get("SIDESTREAM_CHECK_FAILED"):
        terminalreporter.section("failed before the tests", red=True)
        terminalreporter.write_line(f"{failed}: see above")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C arrives, also where a shell that started this in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed; a failing test's output names it."""
    value: int = request.config.getoption("seed")
    print(f"seed {value}: repeat with --seed {value}")
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A generator of its own for each test."""
    return random.Random(seed)


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """The trained tiny model with its four adapters."""
    return ensure_tiny_model()


def _cuda_is_available() -> bool:
    # Torch takes seconds to import, which tests of policy do not need.
    import torch

    return torch.cuda.is_available()
