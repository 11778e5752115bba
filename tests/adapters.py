"""Builds PEFT folders from numpy arrays, and the images that they must become.

Nothing here shares code with the loader: the image is built the long way, entry by entry, with
torch's casts, so that the two can be compared.
"""

import json
import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ipc.base_model import LINEAR_GROUPS, BaseModel, DType, LinearShape

TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
ALL_MODULES = tuple(_PATHS)


def base_model(
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 96,
    dtype: DType = DType.FLOAT32,
    biased: Container[str] = (),
) -> BaseModel:
    """A small Llama's shape; all linears of one decoder layer, the ``biased`` with a bias."""
    kv_size = hidden_size // num_heads * num_kv_heads
    sizes = {
        "q_proj": (hidden_size, hidden_size),
        "k_proj": (hidden_size, kv_size),
        "v_proj": (hidden_size, kv_size),
        "o_proj": (hidden_size, hidden_size),
        "gate_proj": (hidden_size, intermediate_size),
        "up_proj": (hidden_size, intermediate_size),
        "down_proj": (intermediate_size, hidden_size),
    }
    return BaseModel(
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=256,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        dtype=dtype,
        linears=tuple(
            LinearShape(name, _PATHS[name], *sizes[name], name in biased) for name in ALL_MODULES
        ),
    )


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file holds it: ``payload`` is its bytes, row-major and little-endian."""

    dtype: str
    shape: tuple[int, ...]
    payload: bytes

    @classmethod
    def of(cls, values: NDArray[np.float32], dtype: str = "F32") -> "StoredTensor":
        """``values`` rounded to ``dtype``: F32, F16 or BF16."""
        stored = torch.from_numpy(values).to(_STORED[dtype]).reshape(-1)
        return cls(dtype, tuple(values.shape), stored.view(torch.uint8).numpy().tobytes())

    def values(self) -> torch.Tensor:
        """The values, in the stored dtype."""
        flat = torch.frombuffer(bytearray(self.payload), dtype=_STORED[self.dtype])
        return flat.reshape(self.shape)


def tensor_name(layer: int, module: str, factor: str) -> str:
    """PEFT's name of ``factor`` (``lora_A`` or ``lora_B``) of a linear layer."""
    return f"base_model.model.model.layers.{layer}.{_PATHS[module]}.{factor}.weight"


def random_tensors(
    base: BaseModel,
    *,
    rank: int = 8,
    ranks: Mapping[str, int] | None = None,
    modules: Iterable[str] = ("q_proj", "v_proj"),
    layers: Iterable[int] | None = None,
    dtype: str = "F32",
    seed: int = 0,
) -> dict[str, StoredTensor]:
    """A and B of every module in every layer, normally distributed; ``ranks`` by module."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(base.num_layers) if layers is None else layers:
        for module in modules:
            shape = base.linear(module)
            module_rank = (ranks or {}).get(module, rank)
            for factor, size in (
                ("lora_A", (module_rank, shape.in_features)),
                ("lora_B", (shape.out_features, module_rank)),
            ):
                values = generator.standard_normal(size, dtype=np.float32)
                tensors[tensor_name(layer, module, factor)] = StoredTensor.of(values, dtype)
    return tensors


def safetensors_bytes(tensors: Mapping[str, StoredTensor]) -> bytes:
    """A safetensors file with the tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        stop = offset + len(tensor.payload)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    return raw_safetensors(header, b"".join(tensor.payload for tensor in tensors.values()))


def raw_safetensors(header: object, data: bytes) -> bytes:
    """A file with any header at all, also one that lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def config_fields(rank: int = 8, **fields: object) -> dict[str, object]:
    """The fields of an ``adapter_config.json`` that make a plain adapter; others by name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.1,
        "inference_mode": True,
    } | fields


def write_folder(
    folder: Path,
    tensors: Mapping[str, StoredTensor] | bytes | None,
    config: Mapping[str, object] | bytes | None,
) -> Path:
    """Writes a PEFT folder whose files look old, as an adapter's usually are."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        payload = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "adapter_config.json").write_bytes(payload)
    if tensors is not None:
        payload = tensors if isinstance(tensors, bytes) else safetensors_bytes(tensors)
        (folder / "adapter_model.safetensors").write_bytes(payload)
    make_old(folder)
    return folder


def write_adapter(
    folder: Path,
    base: BaseModel,
    *,
    rank: int = 8,
    modules: Iterable[str] = ("q_proj", "v_proj"),
    dtype: str = "F32",
    seed: int = 0,
) -> dict[str, StoredTensor]:
    """Writes a plain random adapter and returns its tensors."""
    modules = list(modules)
    tensors = random_tensors(base, rank=rank, modules=modules, dtype=dtype, seed=seed)
    write_folder(folder, tensors, config_fields(rank, target_modules=modules))
    return tensors


def make_old(folder: Path) -> None:
    """Sets the files' modification times back, so that nothing waits for clocks to move on."""
    for path in folder.iterdir():
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10_000_000_000))


def image_bytes(base: BaseModel, tensors: Mapping[str, StoredTensor]) -> bytes:
    """The image of an adapter of linear layers, built the long way."""
    parts = []
    for layer in range(base.num_layers):
        for group in LINEAR_GROUPS:
            present = [m for m in group if tensor_name(layer, m, "lora_A") in tensors]
            for factor in ("lora_A", "lora_B"):
                for module in present:
                    values = tensors[tensor_name(layer, module, factor)].values()
                    parts.append(_entry_bytes(values, factor, base.dtype))
    return b"".join(parts)


def _entry_bytes(values: torch.Tensor, factor: str, dtype: DType) -> bytes:
    rank = values.shape[0 if factor == "lora_A" else 1]
    missing = -rank % 8
    padding = (0, 0, 0, missing) if factor == "lora_A" else (0, missing)
    padded = torch.nn.functional.pad(values.to(TORCH_DTYPES[dtype]), padding).contiguous()
    payload = padded.view(torch.uint8).numpy().tobytes()
    return payload + bytes(-len(payload) % 128)
