"""Shapes of models and random adapters for measurements."""

from pathlib import Path

import pytest
from safetensors import safe_open

from engine.models.config import read_model_config
from ipc.base_model import DType
from tools.gpu_checks.arithmetic import head_values, linear_values
from tools.shapes import SHAPES, link_adapters, write_adapter, write_model


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_model_that_the_engine_takes(tmp_path: Path, shape: str) -> None:
    config = read_model_config(write_model(tmp_path / "model", shape))
    assert config.num_layers == SHAPES[shape]["num_hidden_layers"]
    assert config.dtype is DType.BFLOAT16


@pytest.mark.parametrize(
    ("shape", "num_linear", "num_head"),
    [("llama-3.1-8b", 6_979_321_856, 525_336_576), ("qwen2.5-7b", 6_525_288_448, 544_997_376)],
)
def test_the_published_models_have_as_many_weights(
    tmp_path: Path, shape: str, num_linear: int, num_head: int
) -> None:
    config = read_model_config(write_model(tmp_path, shape))
    assert linear_values(config, config.base_model(DType.BFLOAT16)) == num_linear
    assert head_values(config) == num_head


def test_an_adapter_has_a_pair_for_every_chosen_linear_of_every_layer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "toy")
    folder = write_adapter(tmp_path / "adapter", model, 4, ("q_proj", "down_proj"))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert len(shapes) == 2 * 2 * 2
    prefix = "base_model.model.model.layers.1"
    assert shapes[f"{prefix}.self_attn.q_proj.lora_A.weight"] == (4, 128)
    assert shapes[f"{prefix}.mlp.down_proj.lora_A.weight"] == (4, 256)
    assert shapes[f"{prefix}.mlp.down_proj.lora_B.weight"] == (128, 4)


def test_linked_adapters_share_their_bytes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "toy")
    source = write_adapter(tmp_path / "source", model, 8)
    folders = link_adapters(source, tmp_path / "many", ["a", "b"])
    assert [folder.name for folder in folders] == ["a", "b"]
    for folder in folders:
        for path in source.iterdir():
            assert (folder / path.name).samefile(path)
