"""Adapters that PEFT itself makes and saves become the images and scalings that PEFT computes."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from ipc.base_model import LINEAR_GROUPS, BaseModel, DType
from ipc.messages import AdapterId, Manifest
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.adapters import ALL_MODULES, TORCH_DTYPES, base_model, make_old
from tests.loader.images import HOST_TIER_BYTES, read_image

NUM_LAYERS = 3
HIDDEN_SIZE = 64


@pytest.fixture(scope="module")
def config() -> Any:
    return transformers.LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )


def base(dtype: DType) -> BaseModel:
    return base_model(num_layers=NUM_LAYERS, hidden_size=HIDDEN_SIZE, dtype=dtype)


def make(config: Any, folder: Path, dtype: torch.dtype, **fields: Any) -> Any:
    """A PEFT model of random weights, saved in ``folder``."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", **{"lora_alpha": 12, "init_lora_weights": False} | fields
    )
    adapted = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    adapted.save_pretrained(folder)
    make_old(folder)
    return adapted


def inspect(folder: Path, dtype: DType) -> tuple[Manifest, bytes]:
    """The manifest and the image that the loader makes."""
    inspector = Inspector(AdapterFolders([str(folder)], None), base(dtype), 64, HOST_TIER_BYTES)
    manifest = inspector.inspect(AdapterId(1), str(folder))
    return manifest, read_image(inspector, manifest)


def pairs(adapted: Any) -> dict[tuple[int, str], Any]:
    """PEFT's own layers by decoder layer and module."""
    return {
        (int(path.split(".layers.")[1].split(".")[0]), path.rsplit(".", 1)[1]): module
        for path, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def image_of(adapted: Any, dtype: DType) -> bytes:
    """The image, entry by entry, from the weights that PEFT holds in memory."""
    layers = pairs(adapted)
    image = b""
    for layer in range(NUM_LAYERS):
        for group in LINEAR_GROUPS:
            for factor in ("lora_A", "lora_B"):
                for module in group:
                    if (layer, module) in layers:
                        weights = getattr(layers[layer, module], factor)["default"].weight
                        image += padded(weights.detach(), factor, dtype)
    return image


def padded(weights: torch.Tensor, factor: str, dtype: DType) -> bytes:
    rows, columns = weights.shape
    if factor == "lora_A":
        rows = (rows + 7) // 8 * 8
    else:
        columns = (columns + 7) // 8 * 8
    entry = torch.zeros(rows, columns, dtype=TORCH_DTYPES[dtype])
    entry[: weights.shape[0], : weights.shape[1]] = weights.to(TORCH_DTYPES[dtype])
    payload = entry.view(torch.uint8).numpy().tobytes()
    return payload + b"\0" * (-len(payload) % 128)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", DType)
def test_image_holds_pefts_weights_in_the_models_dtype(
    config: Any, tmp_path: Path, stored: torch.dtype, dtype: DType
) -> None:
    adapted = make(config, tmp_path, stored, r=8, target_modules=list(ALL_MODULES))
    manifest, image = inspect(tmp_path, dtype)
    assert image == image_of(adapted, dtype)
    assert manifest.max_rank == 8 and len(manifest.modules) == NUM_LAYERS * len(ALL_MODULES)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "target_modules": ["down_proj"], "use_rslora": True},
        {"r": 64, "target_modules": "all-linear"},
        {"r": 16, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"r": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1},
        {"r": 4, "target_modules": ["k_proj", "o_proj"], "exclude_modules": ["1.self_attn.k_proj"]},
        {
            "r": 8,
            "target_modules": ["q_proj", "v_proj", "gate_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 5},
            "alpha_pattern": {"^model.layers.2.mlp.gate_proj": 3, "v_proj": 7},
            "use_rslora": True,
        },
        {"r": 8, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"r": 4, "target_modules": r".*\.(self_attn|mlp)\.(q|up)_proj"},
        {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*layers\.[02]\..*"},
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "layers_to_transform": [1, 2],
            "layers_pattern": ["h", "(?:blocks|layers)"],
        },
        {
            "r": 4,
            "lora_alpha": 3,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.[12]\.self_attn\.(q|v)_proj": 2, r"(down|o)_proj$": 6},
            "alpha_pattern": {r"^model\.layers\.\d+\.mlp.*": 5},
        },
        {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
        {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"},
    ],
)
def test_every_module_has_pefts_rank_and_scaling(
    config: Any, tmp_path: Path, fields: dict[str, Any]
) -> None:
    adapted = make(config, tmp_path, torch.float32, **fields)
    manifest, image = inspect(tmp_path, DType.FLOAT32)
    assert {(m.stage - 1, m.module): (m.rank, m.scaling) for m in manifest.modules} == {
        place: (layer.r["default"], layer.scaling["default"])
        for place, layer in pairs(adapted).items()
    }
    assert image == image_of(adapted, DType.FLOAT32)


def test_fan_in_fan_out_has_no_effect_beside_linear_layers(config: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        adapted = make(
            config, tmp_path, torch.float32, fan_in_fan_out=True, target_modules=["q_proj"]
        )
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"fan_in_fan_out": True}))
    make_old(tmp_path)
    _, image = inspect(tmp_path, DType.FLOAT32)
    assert image == image_of(adapted, DType.FLOAT32)
