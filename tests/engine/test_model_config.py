"""What is read from a Hugging Face folder, and what is refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.models.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    Rope,
    read_model_config,
)
from ipc.base_model import LINEAR_MODULES, DType
from ipc.errors import InvalidRequest

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}


def read(
    folder: Path, *, without: str = "", max_model_len: int | None = None, **changed: Any
) -> ModelConfig:
    fields = {name: value for name, value in (LLAMA | changed).items() if name != without}
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model_config(folder, max_model_len)


def assert_refused(folder: Path, message: str, **changed: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        read(folder, **changed)
    assert error.value.message == message.replace("FILE", str(folder / "config.json"))


def test_a_llama_is_read(tmp_path: Path) -> None:
    assert read(tmp_path) == ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=3,
        hidden_size=64,
        intermediate_size=176,
        vocab_size=300,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope=Rope(10_000.0),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        dtype=DType.BFLOAT16,
        eos_token_ids=(2,),
        max_model_len=8192,
    )


def test_the_loader_is_told_the_shape_of_every_linear(tmp_path: Path) -> None:
    base = read(tmp_path, head_dim=24).base_model(DType.FLOAT32)
    assert (base.dtype, base.num_layers, base.num_stages) == (DType.FLOAT32, 3, 5)
    assert tuple(shape.name for shape in base.linears) == LINEAR_MODULES
    shapes = {shape.path: (shape.in_features, shape.out_features) for shape in base.linears}
    assert shapes == {
        "self_attn.q_proj": (64, 96),
        "self_attn.k_proj": (64, 48),
        "self_attn.v_proj": (64, 48),
        "self_attn.o_proj": (96, 64),
        "mlp.gate_proj": (64, 176),
        "mlp.up_proj": (64, 176),
        "mlp.down_proj": (176, 64),
    }


def test_biases_and_head_norms_are_those_of_the_family(tmp_path: Path) -> None:
    found = {
        family: read(
            tmp_path,
            architectures=[f"{family}ForCausalLM"],
            attention_bias=True,
            mlp_bias=True,
            sliding_window=None,
        )
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
    }
    assert {
        name: (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm)
        for name, config in found.items()
    } == {
        "Llama": (True, True, True, False),
        "Mistral": (False, False, False, False),
        "Qwen2": (True, False, False, False),
        "Qwen3": (True, True, False, True),
    }
    assert found["Qwen3"].head_dim == 128


@pytest.mark.parametrize(
    ("architecture", "biased"),
    [
        ("LlamaForCausalLM", LINEAR_MODULES),
        ("MistralForCausalLM", ()),
        ("Qwen2ForCausalLM", ("q_proj", "k_proj", "v_proj")),
        ("Qwen3ForCausalLM", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_the_loader_is_told_which_linears_have_a_bias(
    tmp_path: Path, architecture: str, biased: tuple[str, ...]
) -> None:
    config = read(
        tmp_path,
        architectures=[architecture],
        attention_bias=True,
        mlp_bias=True,
        sliding_window=None,
    )
    base = config.base_model(DType.FLOAT32)
    assert tuple(shape.name for shape in base.linears if shape.has_bias) == biased


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING | {"type": "llama3"}},
        {"rope_parameters": LLAMA3_SCALING | {"rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_llama3_rope_scaling_is_read_in_every_spelling(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    assert read(tmp_path, **fields).rope == Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 4096))


def test_linear_rope_scaling_is_read(tmp_path: Path) -> None:
    rope = read(tmp_path, rope_scaling={"type": "linear", "factor": 4}).rope
    assert rope == Rope(10_000.0, LinearScaling(4.0))


def test_tokens_that_end_an_answer_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert read(tmp_path).eos_token_ids == (2, 7, 9)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == (7, 2, 9)


def test_a_sliding_window_that_no_sequence_outgrows_is_served(tmp_path: Path) -> None:
    mistral: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert read(tmp_path, max_model_len=4096, **mistral).max_model_len == 4096
    qwen: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096}
    assert read(tmp_path, use_sliding_window=False, **qwen).max_model_len == 8192
    assert read(tmp_path, use_sliding_window=True, max_window_layers=3, **qwen).num_layers == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "architectures in FILE: expected one of LlamaForCausalLM, MistralForCausalLM,"
            " Qwen2ForCausalLM, Qwen3ForCausalLM, got GemmaForCausalLM",
        ),
        (
            {"hidden_size": "64"},
            "FILE: Expected `int`, got `str` - at `$.hidden_size`",
        ),
        (
            {"without": "vocab_size"},
            "FILE: Object missing required field `vocab_size`",
        ),
        (
            {"torch_dtype": "float8_e4m3fn"},
            "FILE: Invalid enum value 'float8_e4m3fn' - at `$.torch_dtype`",
        ),
        ({"hidden_act": "gelu"}, "hidden_act in FILE: expected silu, got gelu"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config in FILE: expected unquantized weights, got gptq",
        ),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads in FILE: expected a divisor of num_attention_heads 4, got 3",
        ),
        (
            {"without": "num_key_value_heads", "architectures": ["Qwen2ForCausalLM"]},
            "num_key_value_heads in FILE: expected a number of heads, got nothing",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type in FILE: expected one of default, linear, llama3, got yarn",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "rope_scaling in FILE: Object missing required field `low_freq_factor`",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor in FILE: expected 1.0, got 0.5",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
            "sliding_window in FILE: expected none below the model's length 8192, unless"
            " max_model_len is lowered to it, got 4096",
        ),
        (
            {"architectures": ["MistralForCausalLM"]},
            "sliding_window in FILE: expected none below the model's length 8192, unless"
            " max_model_len is lowered to it, got 4096",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 1024,
                "max_window_layers": 2,
            },
            "sliding_window in FILE: expected none below the model's length 8192, unless"
            " max_model_len is lowered to it, got 1024",
        ),
        (
            {"max_model_len": 9000},
            "max_model_len: expected one of [1, 8192] (max_position_embeddings in FILE), got 9000",
        ),
    ],
)
def test_what_would_not_be_honoured_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    assert_refused(tmp_path, message, **changed)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"expected a folder with a config\.json"):
        read_model_config(tmp_path / "nowhere")


def test_malformed_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"config\.json: Input data was truncated"):
        read_model_config(tmp_path)
