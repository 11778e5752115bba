"""Adapters under many names, their files written once."""

from pathlib import Path

from tools.gpu_checks.loading.adapters import (
    ATTENTION_MODULES,
    AdapterFolders,
    Family,
    Kind,
    in_turn,
)
from tools.shapes import write_model

WIDE, NARROW = Kind(8), Kind(4, ATTENTION_MODULES)
FAMILY = Family("mixed", (("lora", in_turn((WIDE, NARROW), 5)), ("touch", (WIDE,))))


def test_adapters_of_a_kind_share_one_file_whatever_their_prefix(tmp_path: Path) -> None:
    folders = AdapterFolders(tmp_path / "adapters", write_model(tmp_path / "model", "toy"))
    folder = folders.folder_of(FAMILY)
    names = [*FAMILY.names("lora"), *FAMILY.names("touch")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert names[:2] == ["lora-0000", "lora-0001"]
    inodes = [(folder / name / "adapter_model.safetensors").stat().st_ino for name in names]
    assert len(set(inodes)) == 2
    assert inodes[0] == inodes[2] == inodes[4] == inodes[5] != inodes[1] == inodes[3]
    assert folders.folder_of(FAMILY) == folder


def test_a_slot_of_the_8b_shape_is_as_large_as_its_image(tmp_path: Path) -> None:
    folders = AdapterFolders(tmp_path, write_model(tmp_path / "model", "llama-3.1-8b"))
    assert folders.slot_bytes(Kind(256)) == 256 * 81920 * 2 * 32
    # Rank 4 is padded to 8: q and o are 8,192 values a rank and layer, k and v 5,120.
    assert folders.slot_bytes(NARROW) == 8 * (2 * 8192 + 2 * 5120) * 2 * 32
