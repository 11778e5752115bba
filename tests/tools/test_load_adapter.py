"""Random adapters for measurements are adapters that the loader takes, in every dtype."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ipc.base_model import DType
from ipc.messages import AdapterId
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.adapters import TORCH_DTYPES, base_model
from tools.load_adapter import random_bits, write_random_adapter


@pytest.mark.parametrize("dtype", DType)
def test_random_values_are_finite_of_both_signs_and_not_all_alike(dtype: DType) -> None:
    bits = random_bits(np.random.default_rng(0), 10_001, dtype)
    values = torch.from_numpy(bits.copy()).view(TORCH_DTYPES[dtype])
    assert values.shape == (10_001,)
    assert values.abs().min() >= 2.0**-7 and values.abs().max() < 2.0**-5
    assert 0.45 < float((values < 0).float().mean()) < 0.55
    assert len(np.unique(bits)) >= 512


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("rank", [3, 16])
def test_loader_takes_it_whatever_its_rank_and_dtype(
    tmp_path: Path, rank: int, dtype: DType
) -> None:
    base = base_model(dtype=DType.BFLOAT16)
    adapter = write_random_adapter(tmp_path / "a", base, rank, ("q_proj", "up_proj"), dtype)
    inspector = Inspector(AdapterFolders([str(tmp_path)], None), base, 64, 1 << 20)
    manifest = inspector.inspect(AdapterId(1), str(adapter.folder))
    assert {(module.module, module.rank) for module in manifest.modules} == {
        ("q_proj", rank),
        ("up_proj", rank),
    }
    assert manifest.image_bytes == adapter.layout.num_bytes


def test_offsets_tell_where_each_entry_lies_in_the_file(tmp_path: Path) -> None:
    base = base_model(num_layers=2, dtype=DType.BFLOAT16)
    adapter = write_random_adapter(tmp_path / "a", base, 8)
    content = adapter.file.read_bytes()
    with safe_open(adapter.file, framework="pt") as file:
        for (stage, index), offset in adapter.file_offsets.items():
            entry = adapter.layout.stages[stage].entries[index]
            layer, path = stage - base.layer_stage(0), base.linear(entry.module).path
            factor = entry.kind.value.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
            stored = file.get_tensor(
                f"base_model.model.model.layers.{layer}.{path}.{factor}.weight"
            )
            expected = stored.contiguous().view(torch.uint8).numpy().tobytes()
            assert content[offset : offset + entry.num_bytes] == expected
