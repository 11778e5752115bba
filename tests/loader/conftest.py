"""Fixtures of the loader's tests."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder that holds a folder of adapters."""
    (tmp_path / "adapters").mkdir()
    return tmp_path
