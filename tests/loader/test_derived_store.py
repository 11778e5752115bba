"""What was computed is found again, as long as it is whole and there is room for it."""

import logging
import os
from pathlib import Path

import pytest

from loader.derived_store import DerivedStore, default_folder

KEY = "0123456789abcdef"
PAYLOAD = bytes(range(200))
HEAD_BYTES = 40


def store(folder: Path | None, max_bytes: int = 1 << 20) -> DerivedStore:
    return DerivedStore(folder, max_bytes)


def test_what_is_kept_is_found_by_its_key_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    assert store(folder).find(KEY, 200) is None
    store(folder).keep(KEY, PAYLOAD)
    assert store(folder).find(KEY, 200) == PAYLOAD
    assert store(folder).find(KEY[::-1], 200) is None
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("position", [0, 7, 8, HEAD_BYTES - 1, HEAD_BYTES, HEAD_BYTES + 199])
def test_a_file_with_any_byte_changed_is_as_good_as_absent(
    tmp_path: Path, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path).keep(KEY, PAYLOAD)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert store(tmp_path).find(KEY, 200) is None
    assert "is damaged" in caplog.text
    store(tmp_path).keep(KEY, PAYLOAD)
    assert store(tmp_path).find(KEY, 200) == PAYLOAD


@pytest.mark.parametrize("num_bytes", [0, 10, HEAD_BYTES, HEAD_BYTES + 199])
def test_a_file_that_was_cut_short_is_as_good_as_absent(tmp_path: Path, num_bytes: int) -> None:
    store(tmp_path).keep(KEY, PAYLOAD)
    (path,) = tmp_path.iterdir()
    os.truncate(path, num_bytes)
    assert store(tmp_path).find(KEY, 200) is None


@pytest.mark.parametrize("num_bytes", [0, 199, 201])
def test_a_payload_of_another_length_is_not_it(tmp_path: Path, num_bytes: int) -> None:
    store(tmp_path).keep(KEY, PAYLOAD)
    assert store(tmp_path).find(KEY, num_bytes) is None


def test_the_least_recently_used_leave_for_others(tmp_path: Path) -> None:
    three = store(tmp_path, 3 * (200 + HEAD_BYTES))
    for age, key in enumerate("abc"):
        three.keep(key, PAYLOAD)
        os.utime(tmp_path / f"{key}.rows", ns=(age, age))
    assert three.find("a", 200) == PAYLOAD
    three.keep("d", PAYLOAD)
    assert {path.stem for path in tmp_path.iterdir()} == {"a", "c", "d"}


def test_what_a_writer_left_behind_leaves_in_its_turn_and_foreign_files_stay(
    tmp_path: Path,
) -> None:
    for name in (".part-x.rows", "notes.txt"):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, ns=(0, 0))
    store(tmp_path, 500).keep(KEY, PAYLOAD)
    assert {path.name for path in tmp_path.iterdir()} == {f"{KEY}.rows", "notes.txt"}


def test_a_folder_that_can_not_be_written_is_told_and_fails_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    unwritable = store(tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING):
        unwritable.keep(KEY, PAYLOAD)
        assert unwritable.find(KEY, 200) is None
    assert "what was computed can not be kept in" in caplog.text


def test_without_a_folder_nothing_is_kept() -> None:
    nowhere = store(None)
    nowhere.keep(KEY, PAYLOAD)
    assert nowhere.find(KEY, 200) is None


def test_the_default_folder_is_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/nowhere")
    assert default_folder() == tmp_path / "sidestream/row-scales"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path("/nowhere/.cache/sidestream/row-scales")
    monkeypatch.delenv("HOME")
    assert default_folder() is None
