"""GGUF adapters that are rare, or that lie: what other engines' writers and caches leave."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from ipc.errors import AdapterInvalid
from ipc.messages import AdapterSource
from loader.blocks import cut
from loader.gguf_adapter import plan_gguf
from loader.gguf_header import parse_header
from loader.host_tier import HostTier
from loader.shared_blocks import BlockReader, SharedBlocks
from tests.adapters import base_model, make_old
from tests.loader.gguf_files import Written
from tests.loader.images import read_image
from tests.loader.test_gguf import base_of, inspect


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "gguf").mkdir()
    return tmp_path / "gguf" / "adapter.gguf"


def test_a_file_of_foreign_types_that_is_cut_short_fails_its_read(path: Path) -> None:
    base = base_of()
    Written(path, base, lambda: Type.TQ1_0)
    inspector, manifest = inspect(base, path)
    adapter = inspector.open(AdapterSource(manifest.path, manifest.generation))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4000)
    image = HostTier(1 << 22).reserve(manifest.generation, adapter.plan.layout, [])
    assert image is not None
    blocks = SharedBlocks(cut(adapter.plan, 10_000))
    with pytest.raises(AdapterInvalid, match="it was cut short"):
        BlockReader().read(blocks, image, adapter.files, adapter.plan)
    adapter.files.close()


def test_a_link_to_a_file_of_another_name_is_that_adapter(path: Path) -> None:
    base = base_of()
    Written(path, base, lambda: Type.Q8_0)
    image = read_image(*inspect(base, path))
    blob = path.parent / "4f1c"
    path.rename(blob)
    path.symlink_to(blob)
    inspector, manifest = inspect(base, path)
    assert manifest.path == str(path)
    assert read_image(inspector, manifest) == image


def test_long_arrays_are_passed_over_whole() -> None:
    numbers = np.arange(1000, dtype="<u4").tobytes()
    field = struct.pack("<Q1sIIQ", 1, b"x", 9, 4, 1000) + numbers
    payload = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + field
    header = parse_header(payload, len(payload), "a.gguf")
    assert header.num_bytes == len(payload)
    assert header.metadata == {"x": list(range(1000))}
    with pytest.raises(AdapterInvalid, match="does not end within"):
        parse_header(payload[:-1], len(payload), "a.gguf")


def pair_of_rank(rank: int, path: Path, *, trimmed: bool = False) -> None:
    """An adapter of one pair, of q; ``trimmed`` as ggml itself writes extents of 1: not at all."""
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    rows = np.linspace(-1, 1, 256 * rank, dtype=np.float32).reshape(rank, 256)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", rows.reshape(-1) if trimmed else rows)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", rows.reshape(256, rank))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    make_old(path.parent)


def test_a_pair_of_rank_1_may_have_its_extent_of_1_left_out(path: Path) -> None:
    images = []
    for trimmed in (False, True):
        pair_of_rank(1, path, trimmed=trimmed)
        images.append(read_image(*inspect(base_of(), path)))
    assert images[0] == images[1]


def test_a_head_whose_rows_can_not_be_put_in_order_at_once_is_refused(path: Path) -> None:
    base = base_model(num_layers=1, hidden_size=256, num_heads=1, num_kv_heads=1)
    pair_of_rank(1025, path)
    whole = path.read_bytes()
    with pytest.raises(AdapterInvalid, match=r"rank 1025 of blk\.0\..*lora_b exceeds 1024"):
        plan_gguf(parse_header(whole, len(whole), "a.gguf"), base, 2048, "a.gguf")
