"""Magnitudes and biases are those that the configuration promises, or are refused by name."""

from pathlib import Path

import numpy as np
import pytest

from ipc.errors import AdapterInvalid
from ipc.image import EntryKind, layout_image
from ipc.messages import AdapterId, Manifest
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.adapters import (
    StoredTensor,
    base_model,
    config_fields,
    image_bytes,
    random_tensors,
    tensor_name,
    write_folder,
)
from tests.loader.dora import (
    bias_name,
    deriver_of,
    dora_tensors,
    magnitude_name,
    random_base,
    write_base,
)
from tests.loader.images import read_open, source_of

BASE = base_model(biased=("q_proj",))
MAGNITUDE = magnitude_name(1, "q_proj")
BIAS = bias_name(1, "q_proj")
LONE_BIAS = BIAS.replace("base_layer.", "")
WITHOUT_Q = {
    name: None
    for layer in (0, 1)
    for name in (
        *(tensor_name(layer, "q_proj", factor) for factor in ("lora_A", "lora_B")),
        *(magnitude_name(layer, module) for module in ("q_proj", "v_proj")),
    )
}


def vector(size: int, dtype: str = "F32") -> StoredTensor:
    return StoredTensor.of(np.ones(size, np.float32), dtype)


def inspect(root: Path, tensors: dict[str, StoredTensor], **fields: object) -> Manifest:
    write_folder(root / "a", tensors, config_fields(**fields))  # type: ignore[arg-type]
    inspector = Inspector(AdapterFolders([str(root)], None), BASE, 64, 1 << 20)
    return inspector.inspect(AdapterId(1), str(root / "a"))


def test_the_manifest_says_who_has_a_row_scale_and_who_a_bias(tmp_path: Path) -> None:
    manifest = inspect(tmp_path, dora_tensors(BASE), use_dora=True)
    assert [(m.module, m.row_scale, m.bias) for m in manifest.modules] == [
        ("q_proj", True, True),
        ("v_proj", True, False),
    ] * 2
    kinds = [entry.kind for entry in layout_image(BASE, manifest.modules).stages[1].entries]
    assert kinds[4:] == [EntryKind.ROW_SCALE, EntryKind.BIAS, EntryKind.ROW_SCALE]
    assert manifest.file_bytes == 2 * 4 * (8 * (64 + 64 + 64 + 32) + 64 + 32)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_magnitudes_are_read_by_either_name_and_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = dora_tensors(BASE)
    del tensors[MAGNITUDE]
    tensors[f"{MAGNITUDE}.weight"] = vector(64, dtype)
    assert inspect(tmp_path, tensors, use_dora=True).modules[2].row_scale


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_only_a_bias_that_was_trained_is_one(tmp_path: Path, mode: str) -> None:
    manifest = inspect(tmp_path, random_tensors(BASE) | {BIAS: vector(64)}, bias=mode)
    assert [module.bias for module in manifest.modules] == [False, False, True, False]
    assert not any(module.row_scale for module in manifest.modules)


def test_a_bias_without_a_pair_stands_beside_zeros(tmp_path: Path) -> None:
    base = base_model(biased=("q_proj",))
    weights = random_base(base)
    write_base(tmp_path / "base", weights)
    tensors = random_tensors(base, modules=["v_proj"])
    trained = np.arange(64, dtype=np.float32)
    fields = config_fields(bias="all", target_modules=["v_proj"])
    stored = tensors | {LONE_BIAS: StoredTensor.of(trained)}
    write_folder(tmp_path / "a", stored, fields)
    inspector, deriver = deriver_of(tmp_path, base)
    manifest = inspector.inspect(AdapterId(1), str(tmp_path / "a"))
    assert [(m.stage, m.module, m.rank, m.bias) for m in manifest.modules] == [
        (1, "v_proj", 8, False),
        (2, "q_proj", 1, True),
        (2, "v_proj", 8, False),
    ]
    image = read_open(deriver.open(source_of(manifest)), manifest)
    plain = [image_bytes(base, _of_layer(tensors, layer)) for layer in (0, 1)]
    assert image[: len(plain[0])] == plain[0]
    values = np.frombuffer(image[len(plain[0]) :], np.float32)
    v_a, v_b, q = 8 * 64, 32 * 8, 8 * 64
    assert not values[:q].any() and not values[q + v_a : 2 * q + v_a].any()
    assert values[q : q + v_a].any() and values[2 * q + v_a : 2 * q + v_a + v_b].any()
    of_base = weights["model.layers.1.self_attn.q_proj.bias"].values().numpy()
    assert np.array_equal(values[2 * q + v_a + v_b :], trained - of_base)


def _of_layer(tensors: dict[str, StoredTensor], layer: int) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if f".layers.{layer}." in name}


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        (
            {"use_dora": True},
            {MAGNITUDE: None},
            "layers.1.self_attn.q_proj is targeted by adapter_config.json, whose use_dora is true,"
            " but adapter_model.safetensors has no lora_magnitude_vector of it",
        ),
        (
            {},
            {},
            "adapter_config.json: use_dora is not true, but adapter_model.safetensors has a"
            " lora_magnitude_vector of layers.0.self_attn.q_proj",
        ),
        (
            {"use_dora": True},
            {MAGNITUDE: vector(63)},
            f"tensor '{MAGNITUDE}': expected one of F32, F16, BF16 in [64], got F32 in [63]",
        ),
        (
            {"use_dora": True},
            {MAGNITUDE: StoredTensor("I8", (64,), bytes(64))},
            "expected one of F32, F16, BF16 in [64], got I8 in [64]",
        ),
        (
            {"use_dora": True},
            {f"{MAGNITUDE}.weight": vector(64)},
            f"tensor '{MAGNITUDE}.weight' is the second magnitude of its module",
        ),
        (
            {"use_dora": True},
            {magnitude_name(0, "o_proj"): vector(64)},
            "is of DoRA of what is no targeted linear layer, which can not be served",
        ),
        (
            {"use_dora": True},
            {"base_model.model.lm_head.lora_magnitude_vector": vector(256)},
            "'base_model.model.lm_head.lora_magnitude_vector' is of DoRA of what is no targeted",
        ),
        (
            {"use_dora": True},
            {BIAS: vector(64)},
            "adapter_config.json: bias is 'none', and adapter_model.safetensors holds the bias"
            f" '{BIAS}'",
        ),
        (
            {"use_dora": True, "bias": "all"},
            {BIAS: vector(32)},
            f"tensor '{BIAS}': expected one of F32, F16, BF16 in [64], got F32 in [32]",
        ),
        (
            {"use_dora": True, "bias": "all"},
            {bias_name(0, "v_proj"): vector(32)},
            "v_proj.base_layer.bias' is a trained bias, but the base has none in layers.0.self",
        ),
        (
            {"use_dora": True, "bias": "all"},
            {LONE_BIAS: vector(64)},
            f"bias is 'all', and adapter_model.safetensors holds the bias '{LONE_BIAS}'; expected,"
            " with 'all' or 'lora_only', <module>.base_layer.bias of targeted linear layers, and"
            " with 'all' <module>.bias of others",
        ),
        (
            {"target_modules": ["v_proj"], "bias": "lora_only"},
            {**WITHOUT_Q, LONE_BIAS: vector(64)},
            f"bias is 'lora_only', and adapter_model.safetensors holds the bias '{LONE_BIAS}'",
        ),
        (
            {"target_modules": ["v_proj"], "bias": "all"},
            {**WITHOUT_Q, BIAS: vector(64)},
            f"bias is 'all', and adapter_model.safetensors holds the bias '{BIAS}'",
        ),
        (
            {"target_modules": ["v_proj"], "bias": "all"},
            {**WITHOUT_Q, LONE_BIAS: vector(63)},
            f"tensor '{LONE_BIAS}': expected one of F32, F16, BF16 in [64], got F32 in [63]",
        ),
        (
            {"use_dora": True, "bias": "all"},
            {"base_model.model.model.layers.1.mlp.up_proj.bias": vector(96)},
            "up_proj.bias' is a trained bias, but the base has none in layers.1.mlp.up_proj",
        ),
        (
            {"use_dora": True, "bias": "all"},
            {"base_model.model.lm_head.bias": vector(256)},
            "holds the bias 'base_model.model.lm_head.bias'",
        ),
        (
            {"use_dora": True, "bias": "all"},
            {tensor_name(0, "q_proj", "lora_B").replace("weight", "bias"): vector(64)},
            "bias is 'all', and adapter_model.safetensors holds the bias",
        ),
    ],
)
def test_what_contradicts_the_configuration_is_refused_by_name(
    tmp_path: Path,
    fields: dict[str, object],
    changes: dict[str, StoredTensor | None],
    message: str,
) -> None:
    tensors = dora_tensors(BASE) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(AdapterInvalid) as caught:
        inspect(tmp_path, kept, **fields)
    assert message in caught.value.message
