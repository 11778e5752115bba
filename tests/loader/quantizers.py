"""Quantizes tensors as their writers do, and builds the PEFT folders that hold them.

By bitsandbytes and compressed-tensors themselves, or by torch where there are no scales.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes import functional as bitsandbytes
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle import forward as compressing
from safetensors.torch import save_file
from torch import Tensor

from ipc.base_model import BaseModel
from tests.adapters import config_fields, make_old, tensor_name

RANK = 16
MODULES = ("q_proj", "down_proj")


@dataclass(frozen=True)
class Quantized:
    """``parts`` as a file has them, by what follows ``….lora_A.``; they stand for ``values``.

    Those of compressed-tensors do so in float32: where scales have another dtype, its own code
    rounds each product to that.
    """

    parts: dict[str, Tensor]
    values: Tensor


Quantize = Callable[[Tensor], Quantized]


def rounded(dtype: torch.dtype) -> Quantize:
    """Rounded to a dtype that has no scales."""

    def quantize(weight: Tensor) -> Quantized:
        values = weight.to(dtype)
        return Quantized({"weight": values}, values.float())

    return quantize


def _arguments(columns: int, strategy: str, parts: int, **fields: object) -> QuantizationArgs:
    if strategy == "group":
        fields["group_size"] = columns // parts
    if strategy == "block":
        fields["block_structure"] = [128, 128]
    return QuantizationArgs(strategy=strategy, **fields)


def _random_scales(
    shape: torch.Size, strategy: str, parts: int, dtype: torch.dtype, range_of_zeros: int
) -> tuple[Tensor, Tensor]:
    """Scales, and zeros for them."""
    rows, columns = shape
    size = {
        "tensor": (1, 1),
        "channel": (rows, 1),
        "group": (rows, parts),
        "block": (-(-rows // 128), -(-columns // 128)),
    }[strategy]
    zeros = torch.randint(-range_of_zeros, range_of_zeros, size, dtype=torch.int8)
    return (0.01 + torch.rand(size)).to(dtype), zeros


def compressed(
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    strategy: str,
    *,
    parts: int = 1,
    with_zeros: bool = False,
    flat: bool = False,
) -> Quantize:
    """fp8 or int8 of compressed-tensors; ``strategy`` and ``parts`` of a row share a scale."""

    def quantize(weight: Tensor) -> Quantized:
        kind = "float" if dtype.is_floating_point else "int"
        arguments = _arguments(
            *(weight.shape[1], strategy, parts), num_bits=8, type=kind, symmetric=not with_zeros
        )
        scale, zeros = _random_scales(weight.shape, strategy, parts, scale_dtype, 128)
        chosen = zeros if with_zeros else None
        values = compressing.quantize(3 * weight, scale.float(), chosen, arguments, dtype)
        stored = {"weight": values, "weight_scale": scale.flatten() if flat else scale}
        if with_zeros:
            stored["weight_zero_point"] = zeros
        return Quantized(stored, compressing.dequantize(values, scale.float(), chosen, arguments))

    return quantize


def row_scaled(name: str) -> Quantize:
    """``fp8`` or ``int8``, as near to the weights as a scale for each row permits."""
    dtype, greatest = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}[name]

    def quantize(weight: Tensor) -> Quantized:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / greatest
        values = weight / scale
        values = (values if dtype.is_floating_point else values.round()).to(dtype)
        return Quantized({"weight": values, "weight_scale": scale}, values.float() * scale)

    return quantize


def packed_int4(
    strategy: str,
    *,
    parts: int = 1,
    with_zeros: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    shape_dtype: torch.dtype = torch.int64,
) -> Quantize:
    """int4 of compressed-tensors."""

    def quantize(weight: Tensor) -> Quantized:
        arguments = _arguments(
            *(weight.shape[1], strategy, parts), num_bits=4, type="int", symmetric=not with_zeros
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        scale, zeros = _random_scales(weight.shape, strategy, parts, scale_dtype, 8)
        given = {"weight": weight, "weight_scale": scale.float(), "weight_zero_point": zeros}
        stored = PackedQuantizationCompressor.compress(given, scheme)
        values = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        stored |= {"weight_scale": scale, "weight_shape": stored["weight_shape"].to(shape_dtype)}
        return Quantized(stored, values)

    return quantize


def bitsandbytes_int8(weight: Tensor) -> Quantized:
    values, scb, _ = bitsandbytes.int8_vectorwise_quant(weight.half())
    parts = {"weight": values, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Quantized(parts, bitsandbytes.int8_vectorwise_dequant(values, scb))


def nf4(nested: bool, storage: torch.dtype = torch.uint8) -> Quantize:
    def quantize(weight: Tensor) -> Quantized:
        values, state = bitsandbytes.quantize_4bit(
            weight,
            blocksize=64,
            quant_type="nf4",
            compress_statistics=nested,
            quant_storage=storage,
        )
        parts = {"weight": values} | {
            f"weight.{name}": part for name, part in state.as_dict(packed=True).items()
        }
        # Some processors' code takes blocks not to cross the ends of rows, so there is one row.
        state.shape = torch.Size((1, weight.numel()))
        return Quantized(parts, bitsandbytes.dequantize_4bit(values, state).reshape(weight.shape))

    return quantize


FORMATS: dict[str, Quantize] = {
    "fp32": rounded(torch.float32),
    "fp16": rounded(torch.float16),
    "bf16": rounded(torch.bfloat16),
    "fp8 e4m3": rounded(torch.float8_e4m3fn),
    "fp8 e5m2": rounded(torch.float8_e5m2),
    "fp8 per tensor": compressed(torch.float8_e4m3fn, torch.float32, "tensor", flat=True),
    "fp8 per tensor, e5m2": compressed(torch.float8_e5m2, torch.bfloat16, "tensor"),
    "fp8 per row": compressed(torch.float8_e4m3fn, torch.bfloat16, "channel"),
    "fp8 by blocks": compressed(torch.float8_e4m3fn, torch.float32, "block"),
    "int8 per tensor": compressed(torch.int8, torch.float16, "tensor", flat=True),
    "int8 per row": compressed(torch.int8, torch.bfloat16, "channel"),
    "int8 per row, flat": compressed(torch.int8, torch.float32, "channel", flat=True),
    "int8 by parts of rows": compressed(torch.int8, torch.bfloat16, "group", parts=2),
    "int8 with zeros": compressed(torch.int8, torch.float32, "channel", with_zeros=True),
    "int4 per tensor": packed_int4("tensor", scale_dtype=torch.float32),
    "int4 per row": packed_int4("channel", shape_dtype=torch.int32),
    "int4 by parts of rows": packed_int4("group", parts=2),
    "int4 with a zero per tensor": packed_int4("tensor", with_zeros=True),
    "int4 with zeros": packed_int4("channel", with_zeros=True),
    "int4 with zeros, by parts of rows": packed_int4("group", parts=2, with_zeros=True),
    "bitsandbytes int8": bitsandbytes_int8,
    "NF4": nf4(nested=False),
    "NF4 in bfloat16": nf4(nested=False, storage=torch.bfloat16),
    "NF4, nested": nf4(nested=True),
}


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    modules: Sequence[str] = MODULES,
    rank: int = RANK,
    **fields: object,
) -> Path:
    folder.mkdir()
    config = config_fields(rank, target_modules=list(modules), **fields)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors")
    make_old(folder)
    return folder


def quantized_tensors(
    base: BaseModel, quantize: Quantize, rank: int = RANK, modules: Sequence[str] = MODULES
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of every pair: as quantized, and the values that it stands for."""
    torch.manual_seed(0)
    quantized, plain = {}, {}
    for layer in range(base.num_layers):
        for module in modules:
            shape = base.linear(module)
            for factor, size in (
                ("lora_A", (rank, shape.in_features)),
                ("lora_B", (shape.out_features, rank)),
            ):
                name = tensor_name(layer, module, factor)
                made = quantize(torch.randn(size))
                plain[name] = made.values
                for part, tensor in made.parts.items():
                    quantized[name.removesuffix("weight") + part] = tensor
    return quantized, plain
