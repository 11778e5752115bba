"""In ``--lora-dir`` an adapter is a subfolder, or a GGUF file that is called like one and .gguf."""

import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from ipc.errors import AdapterInvalid, AdapterNotFound, InvalidRequest
from ipc.messages import AdapterId
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.loader.gguf_files import RANK, Written
from tests.loader.images import read_image
from tests.loader.test_gguf import base_of, inspect


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has ``x.gguf``."""
    (tmp_path / "adapters").mkdir()
    Written(tmp_path / "adapters" / "x.gguf", base_of(), lambda: Type.Q8_0)
    return tmp_path / "adapters"


def inspector(folder: Path) -> Inspector:
    return Inspector(AdapterFolders([], str(folder)), base_of(), RANK, 1 << 22)


def test_a_name_finds_a_gguf_file(folder: Path) -> None:
    looking = inspector(folder)
    manifest = looking.inspect_name(AdapterId(1), "x")
    assert manifest.path == str(folder / "x.gguf") and manifest.format == "gguf"
    assert read_image(looking, manifest) == read_image(*inspect(base_of(), folder / "x.gguf"))


@pytest.mark.parametrize("name", ["x.gguf", "y", "notes.txt"])
def test_a_file_has_no_other_name_and_others_are_no_adapters(folder: Path, name: str) -> None:
    (folder / "notes.txt").write_text("")
    with pytest.raises(AdapterNotFound, match=f"no adapter is called '{re.escape(name)}'"):
        inspector(folder).inspect_name(AdapterId(1), name)


def test_a_folder_and_a_file_of_one_name_are_refused_with_both(folder: Path) -> None:
    (folder / "x").mkdir()
    with pytest.raises(AdapterInvalid, match=r"has x/ and x\.gguf: expected one adapter called"):
        inspector(folder).inspect_name(AdapterId(1), "x")
    assert AdapterFolders([], str(folder)).list_names() == ["x"]


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "y.gguf"
    (folder / "x.gguf").rename(outside)
    (folder / "x.gguf").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="lies outside of the allowed roots"):
        inspector(folder).inspect_name(AdapterId(1), "x")


def test_files_are_listed_without_their_suffix(folder: Path) -> None:
    for name in ("a.gguf", ".gguf", ".hidden.gguf", "file.safetensors"):
        (folder / name).write_text("")
    for name in ("b", "c.gguf"):
        (folder / name).mkdir()
    # A folder's name is all of it.
    assert AdapterFolders([], str(folder)).list_names() == ["a", "b", "c.gguf", "x"]
