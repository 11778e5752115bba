"""A large random adapter for benchmarks, and the check that a slot holds exactly its bytes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.lora.pool import AdapterPool
from ipc.base_model import BaseModel
from ipc.image import AdapterModule, Entry, EntryKind, ImageLayout, layout_image

TENSORS_NAME = "adapter_model.safetensors"
_FACTORS = {EntryKind.LORA_A: "lora_A", EntryKind.LORA_B: "lora_B"}
# Without a bfloat16 exponent's highest bit every pattern is a finite number, below 2.
_FINITE = 0xBFFF


@dataclass(frozen=True)
class WrittenAdapter:
    """An adapter on disk: where in its file each entry of its image lies."""

    folder: Path
    layout: ImageLayout
    file_offsets: dict[tuple[int, int], int]

    @property
    def file(self) -> Path:
        return self.folder / TENSORS_NAME


def write_random_adapter(folder: Path, base: BaseModel, rank: int) -> WrittenAdapter:
    """Writes a PEFT folder in bfloat16: every linear of every layer, tensors in PEFT's order.

    ``rank`` is a multiple of 8, so that the image's entries are the file's own bytes. The file is
    on its disk, and in the page cache, when this returns.
    """
    assert rank % 8 == 0, rank
    modules = tuple(
        AdapterModule(base.layer_stage(layer), shape.name, rank, 1.0)
        for layer in range(base.num_layers)
        for shape in base.linears
    )
    layout = layout_image(base, modules)
    paths = {shape.name: shape.path for shape in base.linears}
    named: dict[str, tuple[int, int, Entry]] = {}
    for stage_index, stage in enumerate(layout.stages):
        for entry_index, entry in enumerate(stage.entries):
            layer, factor = stage_index - base.layer_stage(0), _FACTORS[entry.kind]
            name = f"base_model.model.model.layers.{layer}.{paths[entry.module]}.{factor}.weight"
            named[name] = (stage_index, entry_index, entry)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(named):
        entry = named[name][2]
        stop = offset + entry.num_bytes
        shape = [entry.rows, entry.columns]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(paths),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.Generator(np.random.SFC64(1))
    file_offsets: dict[tuple[int, int], int] = {}
    with (folder / TENSORS_NAME).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(named):
            stage_index, entry_index, entry = named[name]
            file_offsets[stage_index, entry_index] = file.tell()
            values = generator.integers(0, 1 << 64, entry.num_bytes // 8, np.uint64)
            bits = values.view(np.uint16)
            bits &= np.uint16(_FINITE)
            file.write(bits.data)
        file.flush()
        # So that no write-back disturbs the measurements.
        os.fdatasync(file.fileno())
    return WrittenAdapter(folder, layout, file_offsets)


def misplaced_entries(
    pool: AdapterPool, extents: tuple[int, ...], adapter: WrittenAdapter
) -> list[str]:
    """Names of the entries of a slot that are not the file's bytes."""
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
