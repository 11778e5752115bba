"""Models' shapes and random adapters for measurements, made on the spot.

A model is a folder with a ``config.json`` alone, for ``--load-format dummy``. An adapter is a PEFT
folder whose tensors hold random finite bfloat16 values; its files can be linked under further
names, so that a thousand adapters take the room of one.
"""

import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.models.config import read_model_config
from ipc.base_model import LINEAR_MODULES, DType

_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_QWEN_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# Small enough for a CPU, with every feature of the large one.
_TOY: dict[str, Any] = {
    **_LLAMA_8B,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.1-8b-4-layers": {**_LLAMA_8B, "num_hidden_layers": 4},
    "llama-3.1-8b-2-layers": {**_LLAMA_8B, "num_hidden_layers": 2},
    "qwen2.5-7b": _QWEN_7B,
    "toy": _TOY,
}
"""Contents of ``config.json`` by name. Source: the models' published configurations."""

_HEADER_LENGTH = struct.Struct("<Q")
# Sign and mantissa are random, the exponent is one of two: 2^-7 <= |x| < 2^-5.
_RANDOM_BITS = 0x80FF
_FIXED_BITS = 0x3C00


def write_model(folder: Path, shape: str) -> Path:
    """The folder, which now holds the ``config.json`` of ``SHAPES[shape]`` and need not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=2) + "\n")
    return folder


def write_adapter(
    folder: Path,
    model: Path,
    rank: int,
    modules: Sequence[str] = LINEAR_MODULES,
    seed: int = 0,
) -> Path:
    """The folder, which must not exist and now holds a PEFT adapter of ``model``'s shape.

    Every layer's linears of ``modules`` have a pair of ``rank``; the scaling is 1.
    """
    base = read_model_config(model).base_model(DType.BFLOAT16)
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
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(base.num_layers):
        for name in modules:
            linear = base.linear(name)
            prefix = f"base_model.model.model.layers.{layer}.{linear.path}"
            shapes[f"{prefix}.lora_A.weight"] = (rank, linear.in_features)
            shapes[f"{prefix}.lora_B.weight"] = (linear.out_features, rank)
    _write_bfloat16(folder / "adapter_model.safetensors", shapes, np.random.default_rng(seed))
    return folder


def link_adapters(source: Path, parent: Path, names: Iterable[str]) -> list[Path]:
    """Folders ``parent/name`` whose files are those of ``source``: equal bytes, stored once."""
    folders = []
    for name in names:
        folder = parent / name
        folder.mkdir(parents=True)
        for path in source.iterdir():
            os.link(path, folder / path.name)
        folders.append(folder)
    return folders


def random_bfloat16_bits(rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    """``count`` bfloat16 values as uint16: finite, of both signs, none of them near zero."""
    bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
    bits &= _RANDOM_BITS
    bits |= _FIXED_BITS
    return bits


def _write_bfloat16(
    path: Path, shapes: dict[str, tuple[int, int]], rng: np.random.Generator
) -> None:
    """Source: the safetensors format, as ``loader/safetensors_header.py`` describes it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + 2 * rows * columns
        header[name] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(_HEADER_LENGTH.pack(len(encoded)))
        file.write(encoded)
        for rows, columns in shapes.values():
            file.write(random_bfloat16_bits(rng, rows * columns).data)
