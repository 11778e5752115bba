"""Ranks whose rows end within a unit: images are those of the values that the writers gave them.

Of int4 a row of 12 values leaves half a word, of NF4 every other row of 3 begins within a byte.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from ipc.base_model import DType
from ipc.errors import AdapterInvalid
from ipc.messages import AdapterSource
from loader.blocks import cut
from loader.host_tier import HostTier
from loader.native.runs import TILE_VALUES, Fault, Format
from loader.nf4 import NF4_VALUES
from loader.shared_blocks import BlockReader, SharedBlocks
from tests.adapters import base_model
from tests.loader.native.filling import fill_runs, run
from tests.loader.native.reference_casts import cast
from tests.loader.quantizers import FORMATS, Quantize, packed_int4, quantized_tensors, write
from tests.loader.test_quantized import A_OF_Q, image_of, inspect, state

RANKS = (1, 3, 7, 12)
FOUR_BITS = ("int4 per tensor", "int4 per row", "int4 with zeros", "NF4", "NF4, nested")


def assert_same_images(folder: Path, quantize: Quantize, rank: int, dtype: DType) -> None:
    # Neither hidden size is a multiple of 8 or of a block, so A's rows end within units, too.
    base = base_model(num_layers=1, hidden_size=36, intermediate_size=75, dtype=dtype)
    quantized, plain = quantized_tensors(base, quantize, rank)
    image = image_of(base, write(folder / "quantized", quantized, rank=rank))
    assert image == image_of(base, write(folder / "plain", plain, rank=rank))
    assert any(image)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("format", FOUR_BITS)
def test_any_rank_is_served_as_it_was_written(
    tmp_path: Path, format: str, rank: int, dtype: DType
) -> None:
    assert_same_images(tmp_path, FORMATS[format], rank, dtype)


@pytest.mark.parametrize("with_zeros", [False, True])
def test_parts_of_rows_that_share_a_scale_may_end_within_a_word(
    tmp_path: Path, with_zeros: bool
) -> None:
    quantize = packed_int4("group", parts=3, with_zeros=with_zeros)
    assert_same_images(tmp_path, quantize, 12, DType.BFLOAT16)


@pytest.mark.parametrize("block_bytes", [1, 100, 333])
@pytest.mark.parametrize("format", ["int4 per row", "NF4"])
def test_blocks_may_begin_at_any_row(tmp_path: Path, format: str, block_bytes: int) -> None:
    base = base_model(num_layers=1, hidden_size=36, intermediate_size=75)
    quantized, plain = quantized_tensors(base, FORMATS[format], 3)
    inspector, manifest = inspect(base, write(tmp_path / "quantized", quantized, rank=3))
    adapter = inspector.open(AdapterSource(manifest.path, manifest.generation))
    image = HostTier(1 << 20).reserve(manifest.generation, adapter.plan.layout, [])
    assert image is not None
    for view in image.views(0, image.num_bytes):
        view[:] = b"\xaa" * view.nbytes
    blocks = SharedBlocks(cut(adapter.plan, block_bytes))
    BlockReader().read(blocks, image, adapter.files, adapter.plan)
    adapter.files.close()
    read = b"".join(image.views(0, image.num_bytes))
    assert read == image_of(base, write(tmp_path / "plain", plain, rank=3))


def test_the_manifest_counts_what_rows_leave_of_their_last_words(tmp_path: Path) -> None:
    base = base_model()
    quantized, _ = quantized_tensors(base, FORMATS["int4 per row"], 12)
    _, manifest = inspect(base, write(tmp_path / "a", quantized, rank=12))
    described = sum(t.nbytes for name, t in quantized.items() if name.endswith("weight_shape"))
    assert manifest.file_bytes == sum(tensor.nbytes for tensor in quantized.values()) - described


@pytest.mark.parametrize("target", [Format.FLOAT32, Format.BFLOAT16])
@pytest.mark.parametrize(
    ("source", "rows", "columns", "row_bytes", "together"),
    [
        (Format.INT4, 3, TILE_VALUES // 2 + 1, TILE_VALUES // 4 + 4, 1),
        (Format.INT4, 2, TILE_VALUES + 3, TILE_VALUES // 2 + 4, 1),
        # Two rows fit into a tile, then three.
        (Format.NF4, 5, TILE_VALUES // 2 - 1, 0, 2),
        (Format.NF4, 7, TILE_VALUES // 3, 0, 2),
        (Format.NF4, 1, TILE_VALUES + 1, 0, 2),
    ],
)
def test_rows_may_end_within_a_unit_in_any_tile(
    tmp_path: Path,
    target: Format,
    source: Format,
    rows: int,
    columns: int,
    row_bytes: int,
    together: int,
) -> None:
    num_bytes = rows * row_bytes or source.num_bytes(rows * columns)
    packed = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    (tmp_path / "packed").write_bytes(packed.tobytes())
    low, high = packed & 15, packed >> 4
    if source is Format.INT4:
        indices = np.stack((low, high), axis=1).reshape(rows, -1)[:, :columns]
        values = indices.astype(np.float32) - np.float32(8)
    else:
        indices = np.stack((high, low), axis=1).reshape(-1)[: rows * columns]
        values = NF4_VALUES[indices].reshape(rows, columns)
    # Images have rows of another length, or of the same.
    for spare in (0, 3):
        padded = np.pad(values, ((0, 0), (0, spare)))
        fault, expected = cast(padded.view(np.uint32), Format.FLOAT32, target)
        runs = [
            run(
                *(source, target, rows, columns),
                entry_columns=columns + spare,
                row_bytes=row_bytes,
                rows_together=together,
            )
        ]
        filled = fill_runs(tmp_path / "packed", runs, expected.nbytes)
        assert filled.fault is fault is Fault.NONE
        assert filled.target == expected.tobytes()


def test_rows_of_nf4_too_wide_to_begin_within_a_byte_are_refused(tmp_path: Path) -> None:
    base, columns = base_model(), TILE_VALUES // 2 + 1
    tensors, _ = quantized_tensors(base, FORMATS["NF4"])
    described = A_OF_Q + "weight.quant_state.bitsandbytes__nf4"
    tensors[described] = state(shape=[1, columns])(tensors[described])
    tensors[A_OF_Q + "weight"] = torch.zeros(-(-columns // 2), 1, dtype=torch.uint8)
    with pytest.raises(AdapterInvalid, match="an even number of columns, or at most 131072, got"):
        inspect(base, write(tmp_path / "a", tensors))
