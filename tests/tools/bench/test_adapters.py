"""Random adapters for servers under measurement."""

from pathlib import Path

import pytest

from ipc.errors import InvalidRequest
from tools.bench.adapters import adapter_names, make_adapters
from tools.shapes import write_model


def test_ranks_take_turns_in_alphabetical_order() -> None:
    named = adapter_names([(8, 2), (64, 3)])
    assert named == [
        ("lora-000-r8", 8),
        ("lora-001-r64", 64),
        ("lora-002-r8", 8),
        ("lora-003-r64", 64),
        ("lora-004-r64", 64),
    ]
    many = [name for name, _ in adapter_names([(8, 1200)])]
    assert many == sorted(many)


def test_adapters_of_a_rank_are_one_files_hard_links(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "toy")
    names = make_adapters(tmp_path / "adapters", model, [(8, 2), (16, 1)])
    assert names == ["lora-000-r8", "lora-001-r16", "lora-002-r8"]
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == names
    inodes = {
        name: (tmp_path / "adapters" / name / "adapter_model.safetensors").stat().st_ino
        for name in names
    }
    assert inodes["lora-000-r8"] == inodes["lora-002-r8"] != inodes["lora-001-r16"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(InvalidRequest, match=r"^--make-adapters: expected an empty folder, got "):
        make_adapters(tmp_path, tmp_path, [(8, 1)])
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
