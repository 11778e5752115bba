"""A checkpoint fits the model tensor by tensor, or is refused by the tensor's name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.device import CpuDevice
from engine.models.config import ModelConfig, Rope
from engine.models.decoder import Decoder
from engine.models.weights import checkpoint_identities, load_model
from ipc.base_model import DType
from ipc.errors import InvalidRequest
from loader.base_weights import BaseWeights


def config(tied: bool = False) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        num_layers=2,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=20,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=Rope(10_000.0),
        qkv_bias=True,
        o_bias=False,
        mlp_bias=True,
        qk_norm=True,
        tie_word_embeddings=tied,
        dtype=DType.FLOAT32,
        eos_token_ids=(),
        max_model_len=32,
    )


def checkpoint(tied: bool = False) -> dict[str, Tensor]:
    """Random values under the names and in the shapes that the model expects."""
    expected = Decoder(config(tied), DType.FLOAT32, CpuDevice()).checkpoint_tensors()
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in expected.items()}


def load(folder: Path, dtype: DType = DType.FLOAT32, tied: bool = False) -> Decoder:
    return load_model(config(tied), folder, dtype, CpuDevice())


def assert_holds(decoder: Decoder, values: dict[str, Tensor]) -> None:
    loaded = decoder.checkpoint_tensors()
    assert loaded.keys() == values.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, values[name].to(tensor.dtype)), name


def test_every_tensor_of_a_single_file_finds_its_place(tmp_path: Path) -> None:
    values = checkpoint()
    save_file(values, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path), values)


def test_every_tensor_of_a_sharded_checkpoint_finds_its_place(tmp_path: Path) -> None:
    values = checkpoint()
    names = sorted(values)
    weight_map: dict[str, str] = {}
    for shard, of_shard in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: values[name] for name in of_shard}, tmp_path / shard)
        weight_map |= dict.fromkeys(of_shard, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_holds(load(tmp_path), values)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InvalidRequest, match=r"expected a file b\.safetensors beside it"):
        load(tmp_path)


def test_weights_are_rounded_to_the_dtype(tmp_path: Path) -> None:
    values = checkpoint()
    save_file(values, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path, DType.BFLOAT16), values)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(tmp_path: Path) -> None:
    values = checkpoint(tied=True)
    head = values["model.embed_tokens.weight"].clone()
    save_file(values | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path, tied=True), values)
    save_file(values | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidRequest, match=r"lm_head\.weight .* expected it to equal"):
        load(tmp_path, tied=True)


def test_derived_tensors_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    values = checkpoint()
    derived = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(values | derived, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path), values)


def without_some(values: dict[str, Tensor]) -> None:
    for layer in (0, 1):
        for name in ("gate_proj", "up_proj", "down_proj"):
            del values[f"model.layers.{layer}.mlp.{name}.bias"]


def with_strangers(values: dict[str, Tensor]) -> None:
    values["model.layers.0.self_attn.o_proj.bias"] = torch.ones(16)


def with_wrong_shape(values: dict[str, Tensor]) -> None:
    values["model.layers.1.self_attn.k_proj.weight"] = torch.ones(16, 16)


def with_integers(values: dict[str, Tensor]) -> None:
    values["model.norm.weight"] = torch.ones(16, dtype=torch.int8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without_some,
            "expected tensors that are not there: model.layers.0.mlp.gate_proj.bias,"
            " model.layers.0.mlp.up_proj.bias, model.layers.0.mlp.down_proj.bias,"
            " model.layers.1.mlp.gate_proj.bias and 2 more",
        ),
        (
            with_strangers,
            "got tensors that the model has no use for: model.layers.0.self_attn.o_proj.bias",
        ),
        (
            with_wrong_shape,
            "model.layers.1.self_attn.k_proj.weight in FOLDER: expected shape [8, 16],"
            " got [16, 16]",
        ),
        (with_integers, "model.norm.weight in FOLDER: expected one of F32, F16, BF16, got I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    values = checkpoint()
    spoil(values)
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(InvalidRequest) as error:
        load(tmp_path)
    assert error.value.message.endswith(message.replace("FOLDER", str(tmp_path)))


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    values = checkpoint()
    values["model.norm.weight"][3] = 70_000.0
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(InvalidRequest, match=r"that float16 can hold, got 70000\.0"):
        load(tmp_path, DType.FLOAT16)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidRequest, match="expected a safetensors file"):
        load(tmp_path)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InvalidRequest, match=r"expected model\.safetensors or .*, got neither"):
        load(tmp_path)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_loader_finds_the_files_that_were_read(tmp_path: Path, num_shards: int) -> None:
    values = checkpoint()
    names = sorted(values)
    weight_map: dict[str, str] = {}
    for index in range(num_shards):
        name = "model.safetensors" if num_shards == 1 else f"{9 - index}.safetensors"
        of_shard = names[index::num_shards]
        save_file({name: values[name] for name in of_shard}, tmp_path / name)
        weight_map |= dict.fromkeys(of_shard, name)
    if num_shards > 1:
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "model.safetensors.index.json").write_text(index_text)
    found = BaseWeights(str(tmp_path), DType.FLOAT32)
    found.close()
    assert found.identities == checkpoint_identities(tmp_path)
    assert len(found.identities) == num_shards
