"""The base model's files are read as the engine holds them, or it is said what is wrong."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ipc.base_model import DType
from ipc.errors import Unavailable
from loader.base_weights import BaseWeights
from loader.floats import widen, widen_as
from loader.safetensors_header import TensorDType
from tests.adapters import TORCH_DTYPES, StoredTensor, base_model, safetensors_bytes
from tests.loader.dora import random_base, write_base

NAME = "model.layers.1.mlp.up_proj.weight"
SHAPE = (96, 64)


def shard(folder: Path, tensors: dict[str, StoredTensor], num_shards: int) -> None:
    """Writes them as a sharded checkpoint, its parts in folders elsewhere, as a hub's cache."""
    folder.mkdir()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: tensors[name] for name in names[index::num_shards]}
        (folder.parent / f"blob{index}").write_bytes(safetensors_bytes(part))
        (folder / file).symlink_to(folder.parent / f"blob{index}")
        weight_map |= dict.fromkeys(part, file)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)


@pytest.mark.parametrize("num_shards", [0, 1, 3])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", DType)
def test_rows_are_rounded_as_torch_does(
    tmp_path: Path, num_shards: int, stored: str, dtype: DType
) -> None:
    tensors = random_base(base_model(), stored)
    if num_shards:
        shard(tmp_path / "base", tensors, num_shards)
    else:
        write_base(tmp_path / "base", tensors)
    weights = BaseWeights(str(tmp_path / "base"), dtype)
    rows = weights.read_rows(NAME, SHAPE, 5, 17)
    weights.close()
    expected = tensors[NAME].values().to(TORCH_DTYPES[dtype]).float()[5:17]
    assert rows.dtype == np.float32 and rows.flags.writeable
    assert torch.equal(torch.from_numpy(rows), expected)


@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
def test_every_kind_of_number_is_rounded_to_nearest_even(dtype: DType) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint64).astype(np.uint32)
    # Halves of last places, where ties are.
    bits[::2] &= np.uint32(0xFFFF_8000)
    bits[1::4] &= np.uint32(0xFFFF_F000)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    rounded = widen_as(values.tobytes(), TensorDType.F32, dtype)
    expected = torch.from_numpy(values.copy()).to(TORCH_DTYPES[dtype]).float()
    assert torch.equal(torch.from_numpy(rounded), expected)


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_every_half_is_widened_exactly(stored: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = torch.from_numpy(widen(bits.tobytes(), TensorDType(stored)))
    kind = torch.float16 if stored == "F16" else torch.bfloat16
    expected = torch.from_numpy(bits.view(np.int16).copy()).view(kind).float()
    assert torch.equal(values[~expected.isnan()], expected[~expected.isnan()])
    assert values[expected.isnan()].isnan().all()


def test_any_rewrite_changes_the_identity(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", random_base(base_model()))
    found = []
    for _ in range(2):
        weights = BaseWeights(str(folder), DType.FLOAT32)
        found.append(weights.identities)
        weights.close()
    os.utime(folder / "model.safetensors", ns=(0, 0))
    weights = BaseWeights(str(folder), DType.FLOAT32)
    assert found[0] == found[1] != weights.identities
    weights.close()


def test_a_file_that_is_written_to_meanwhile_is_told(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", random_base(base_model()))
    weights = BaseWeights(str(folder), DType.FLOAT32)
    weights.check_unchanged()
    os.utime(folder / "model.safetensors", ns=(0, 0))
    with pytest.raises(Unavailable, match=r"model\.safetensors changed while it was read"):
        weights.check_unchanged()
    weights.close()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (NAME, (96, 65), "expected floating-point numbers in [96, 65], got F32 in [96, 64]"),
        ("model.layers.9.mlp.up_proj.weight", SHAPE, "weight': expected one, got none"),
        ("whole", (4,), "expected floating-point numbers in [4], got I32 in [4]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    tensors = random_base(base_model()) | {"whole": StoredTensor("I32", (4,), bytes(16))}
    weights = BaseWeights(str(write_base(tmp_path / "base", tensors)), DType.FLOAT32)
    with pytest.raises(Unavailable) as caught:
        weights.read_rows(name, shape, 0, 1)
    weights.close()
    assert f"the base model in {tmp_path}/base can not be read: tensor {name!r}" in str(
        caught.value
    )
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "model.safetensors.index.json No such file or directory"),
        ({"model.safetensors.index.json": b"{}"}, "expected a weight_map from tensors to files"),
        ({"model.safetensors.index.json": b"{"}, "is not valid JSON"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'},
            "gone.safetensors No such file or directory",
        ),
        ({"model.safetensors": b"\xff" * 100}, "its header claims"),
    ],
)
def test_a_folder_without_a_checkpoint_is_told_and_nothing_stays_open(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, payload in files.items():
        (tmp_path / name).write_bytes(payload)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Unavailable) as caught:
        BaseWeights(str(tmp_path), DType.FLOAT32)
    assert f"the base model in {tmp_path} can not be read" in caught.value.message
    assert message in caught.value.message
    assert os.listdir("/proc/self/fd") == before
