"""Machine code finds a place, and is never taken for that of something else."""

from pathlib import Path

import pytest

from loader.native import code_folder
from loader.native.code_folder import writable_code_folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's folder; there is no home and no setting."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name in ("a.py", "b.py"):
        (folder / name).write_text("pass")
    monkeypatch.setattr(code_folder, "__file__", str(folder / "a.py"))
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_first_place_that_can_be_written_is_taken(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parent() -> Path:
        folder = writable_code_folder("1")
        assert folder is not None and folder.is_dir()
        return folder.parent

    assert parent() == package / "__pycache__"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert parent() == tmp_path / "home/.cache/sidestream"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert parent() == tmp_path / "cache/sidestream"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert parent() == package / "__pycache__"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "chosen"))
    assert parent() == tmp_path / "chosen"


@pytest.mark.usefixtures("package")
def test_place_that_was_chosen_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/dev/null")
    assert writable_code_folder("1") is None


def test_name_changes_with_the_compiler_and_with_every_source(package: Path) -> None:
    first = writable_code_folder("1")
    assert writable_code_folder("1") == first
    assert writable_code_folder("2") != first
    (package / "b.py").write_text("pass  # otherwise")
    assert writable_code_folder("1") != first
