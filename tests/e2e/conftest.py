"""One server shared by the tests that only ask."""

import os
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.harness import Server, serving
from tools.tiny_model.cache import TinyModel

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
