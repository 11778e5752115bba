"""Random adapters for measurements, and the check that a slot holds exactly an adapter's bytes."""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.lora.pool import AdapterPool
from ipc.base_model import LINEAR_MODULES, BaseModel, DType
from ipc.image import AdapterModule, EntryKind, ImageLayout, layout_image

TENSORS_NAME = "adapter_model.safetensors"

_STORED = {DType.FLOAT32: "F32", DType.FLOAT16: "F16", DType.BFLOAT16: "BF16"}
_FACTORS = {EntryKind.LORA_A: "lora_A", EntryKind.LORA_B: "lora_B"}
_HEADER_LENGTH = struct.Struct("<Q")
# Of each value in a word: sign and mantissa are random, the exponent is one of two, and so
# 2^-7 <= |x| < 2^-5.
_PAIR, _QUAD = 0x0000_0001_0000_0001, 0x0001_0001_0001_0001
_RANDOM_BITS = {
    DType.FLOAT32: 0x80FF_FFFF * _PAIR,
    DType.FLOAT16: 0x87FF * _QUAD,
    DType.BFLOAT16: 0x80FF * _QUAD,
}
_FIXED_BITS = {
    DType.FLOAT32: 0x3C00_0000 * _PAIR,
    DType.FLOAT16: 0x2000 * _QUAD,
    DType.BFLOAT16: 0x3C00 * _QUAD,
}


@dataclass(frozen=True)
class WrittenAdapter:
    """An adapter on disk: where in its file the tensor of each entry of its image lies."""

    folder: Path
    layout: ImageLayout
    file_offsets: dict[tuple[int, int], int]

    @property
    def file(self) -> Path:
        return self.folder / TENSORS_NAME


def write_random_adapter(
    folder: Path,
    base: BaseModel,
    rank: int,
    modules: Sequence[str] = LINEAR_MODULES,
    dtype: DType = DType.BFLOAT16,
    seed: int = 0,
) -> WrittenAdapter:
    """Writes a PEFT folder, which must not exist, with tensors of ``dtype`` in PEFT's order.

    Every layer's linears of ``modules`` have a pair of ``rank``; the scaling is 1. The file is on
    its disk, and in the page cache, when this returns.
    """
    layout = layout_image(
        base,
        (
            AdapterModule(base.layer_stage(layer), module, rank, 1.0)
            for layer in range(base.num_layers)
            for module in modules
        ),
    )
    # By a tensor's name: its entry, and its shape in the file, where ranks are not padded.
    named: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    for stage_index, stage in enumerate(layout.stages):
        for entry_index, entry in enumerate(stage.entries):
            linear, factor = base.linear(entry.module), _FACTORS[entry.kind]
            layer = stage_index - base.layer_stage(0)
            name = f"base_model.model.model.layers.{layer}.{linear.path}.{factor}.weight"
            is_a = entry.kind is EntryKind.LORA_A
            shape = (rank, linear.in_features) if is_a else (linear.out_features, rank)
            named[name] = ((stage_index, entry_index), shape)
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(modules),
        "bias": "none",
        "lora_dropout": 0.0,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    in_order = {name: named[name] for name in sorted(named)}
    header = _header({name: shape for name, (_, shape) in in_order.items()}, dtype)
    rng = np.random.Generator(np.random.SFC64(seed))
    file_offsets: dict[tuple[int, int], int] = {}
    with (folder / TENSORS_NAME).open("wb") as file:
        file.write(header)
        for entry_at, (rows, columns) in in_order.values():
            file_offsets[entry_at] = file.tell()
            file.write(random_bits(rng, rows * columns, dtype).data)
        file.flush()
        # So that no write-back disturbs the measurements.
        os.fdatasync(file.fileno())
    return WrittenAdapter(folder, layout, file_offsets)


def random_bits(
    rng: np.random.Generator, count: int, dtype: DType
) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """``count`` values as integers: finite, of both signs, none of them near zero."""
    words = rng.integers(0, 1 << 64, -(-count * dtype.num_bytes // 8), np.uint64)
    words &= np.uint64(_RANDOM_BITS[dtype])
    words |= np.uint64(_FIXED_BITS[dtype])
    if dtype is DType.FLOAT32:
        return words.view(np.uint32)[:count]
    return words.view(np.uint16)[:count]


def misplaced_entries(
    pool: AdapterPool, extents: tuple[int, ...], adapter: WrittenAdapter
) -> list[str]:
    """Names of the entries of a slot that are not the file's bytes.

    The adapter is in the model's dtype, its rank a multiple of 8: so its entries have to be.
    """
    wrong = []
    file = np.memmap(adapter.file, np.uint8, "c")
    for stage_index, stage in enumerate(adapter.layout.stages):
        for entry_index, entry in enumerate(stage.entries):
            offset = adapter.file_offsets[stage_index, entry_index]
            expected = torch.from_numpy(file[offset : offset + entry.num_bytes])
            placed = pool.extent_view(extents[stage_index] + entry.offset, entry.num_bytes)
            if not torch.equal(placed, expected.to(placed.device)):
                wrong.append(f"stage {stage_index}: {entry.kind.value} of {entry.module}")
    return wrong


def _header(shapes: dict[str, tuple[int, int]], dtype: DType) -> bytes:
    """Source: the safetensors format, as ``loader/safetensors_header.py`` describes it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + dtype.num_bytes * rows * columns
        header[name] = {
            "dtype": _STORED[dtype],
            "shape": [rows, columns],
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return _HEADER_LENGTH.pack(len(encoded)) + encoded
