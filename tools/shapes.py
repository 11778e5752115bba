"""Models' shapes, and random adapters of them, for measurements; made on the spot.

A model is a folder with a ``config.json`` alone, for ``--load-format dummy``. The files of an
adapter can be linked under further names, so that a thousand adapters take the room of one.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.models.config import read_model_config
from ipc.base_model import LINEAR_MODULES, DType
from tools.load_adapter import write_random_adapter

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
    """The folder, which must not exist and now holds a bfloat16 adapter of ``model``'s shape."""
    base = read_model_config(model).base_model(DType.BFLOAT16)
    return write_random_adapter(folder, base, rank, modules, seed=seed).folder


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
