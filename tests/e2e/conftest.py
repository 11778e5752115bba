"""One server shared by the tests that only ask."""

import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import Server, serving
from tools.tiny_model.cache import TinyModel

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Where the engine computes; a machine with a GPU runs the same tests on it with "cuda".
DEVICE = os.environ.get("SIDESTREAM_TEST_DEVICE", "cpu")
# Two of the four adapters fit, so that adapters come and go.
POOL_FOR_TWO = "260KiB"


def serve_arguments(tiny_model: TinyModel) -> list[str]:
    """The tiny model with its four adapters over room for two."""
    arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
    arguments += ["--served-model-name", "tiny", "--max-adapter-memory", POOL_FOR_TWO]
    # Servers of several tests run beside each other: none may take what a GPU has left.
    arguments += ["--kv-cache-memory", "64MiB"]
    for name, path in tiny_model.adapters.items():
        arguments += ["--lora", f"{name}={path}"]
    return arguments


@pytest.fixture(scope="session")
def server(tiny_model: TinyModel, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Shared: a test leaves it as it found it. Its log is shown if any test has failed."""
    with serving(*serve_arguments(tiny_model)) as shared:
        yield shared
        if request.session.testsfailed:
            print(shared.log, file=sys.stderr)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A module's, because playwright's loop runs in this thread for as long as it is open."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium on PATH")
    with playwright.sync_playwright() as started:
        # As root, and in most containers, Chromium's own sandbox can not start.
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
