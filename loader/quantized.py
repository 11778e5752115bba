"""Tells how a tensor of a safetensors file is quantized, by the tensors that stand beside it.

There is no single standard: with `P` for `….q_proj.lora_A` these are understood.

| format                   | values                        | beside them                          |
|--------------------------|-------------------------------|--------------------------------------|
| none                     | `P.weight` fp32, fp16, bf16   |                                      |
| fp8                      | `P.weight` e4m3 or e5m2       |                                      |
| fp8, compressed-tensors  | the same                      | `P.weight_scale`                     |
| int8, compressed-tensors | `P.weight` int8               | the same, `P.weight_zero_point`      |
| int4, compressed-tensors | `P.weight_packed` int32       | `P.weight_scale`, `P.weight_shape`,  |
|                          |                               | `P.weight_zero_point` int32, or int8 |
| int8, bitsandbytes       | `P.weight` int8               | `P.SCB`, `P.weight_format`           |
| NF4, bitsandbytes        | `P.weight` uint8, or as floats| `P.weight.absmax`, `….quant_map`,    |
|                          |                               | `….quant_state.bitsandbytes__nf4`    |
| … with nested scales     | the same                      | `….nested_absmax`,                   |
|                          |                               | `….nested_quant_map` as well         |

A scale is for the whole tensor, a row, some neighbours in a row, or a block of 128 × 128. Whatever
else stands beside a tensor, or has another shape, is refused.

Sources: ``compressed_tensors.quantization.lifecycle.forward``, ``pack_to_int32``;
``QuantState.from_dict`` and ``int8_vectorwise_dequant`` of bitsandbytes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from ipc.errors import AdapterInvalid
from loader import strict_json
from loader.floats import FLOAT_DTYPES
from loader.native.runs import FILE_FORMATS, TILE_VALUES, Format
from loader.nf4 import NF4_VALUES
from loader.safetensors_header import TensorDType
from loader.scales import (
    NestedScales,
    PackedZeros,
    PlainScales,
    ScaleGrid,
    StoredTensor,
    TensorScales,
)
from loader.strict_json import shorten

WEIGHT = "weight"
PACKED = "weight_packed"
_SCALE, _ZEROS, _SHAPE = "weight_scale", "weight_zero_point", "weight_shape"
_SCB, _SCB_FORMAT = "SCB", "weight_format"
_ABSMAX, _CODE = "weight.absmax", "weight.quant_map"
_OUTER, _OUTER_CODE = "weight.nested_absmax", "weight.nested_quant_map"
_STATE = "weight.quant_state.bitsandbytes__nf4"

_BLOCK = 128
_ONE = ((), (1,), (1, 1))
# A scale is the greatest magnitude in its row. Bitsandbytes rounds the reciprocal to float32, too.
_SCB_FACTOR = float(np.float32(1 / 127))
_FLOAT8 = (TensorDType.F8_E4M3, TensorDType.F8_E5M2)
# All the same bytes, under whatever dtype others of the model have.
_NF4_STORAGE = (TensorDType.U8, *FLOAT_DTYPES)

TOLD_WHEN_INSPECTED = (_SHAPE, _SCB_FORMAT, _CODE, _STATE)
"""What a plan depends on beyond names and shapes: tensors of few bytes, by how names end."""

ReadSmall = Callable[[StoredTensor], bytes]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How ``[rows, columns]`` values lie in ``values``."""

    values: StoredTensor
    format: Format
    rows: int
    columns: int
    scales: TensorScales | None = None


def encoding_of(parts: Mapping[str, StoredTensor], read: ReadSmall) -> Encoding:
    """How a tensor is encoded.

    ``parts`` are the tensors whose names begin with its own, by the rest of their names. ``read``
    gives the bytes of those in ``TOLD_WHEN_INSPECTED``.

    Raises:
        AdapterInvalid: no format that is understood has such tensors.
    """
    found = _Parts(parts, read)
    if PACKED in parts:
        return found.packed_int4()
    if WEIGHT not in parts:
        name = next(iter(parts))
        raise AdapterInvalid(
            f"tensor {parts[name].tensor.name!r} stands beside no {WEIGHT} or {PACKED}"
        )
    weight = parts[WEIGHT]
    if _STATE in parts or weight.tensor.dtype is TensorDType.U8:
        return found.nf4()
    found.check_matrix(weight)
    rows, columns = weight.tensor.shape
    dtype = weight.tensor.dtype
    if dtype is TensorDType.I8:
        return found.int8(rows, columns)
    if dtype not in FILE_FORMATS:
        expected = ", ".join(each.value for each in (*FILE_FORMATS, TensorDType.I8))
        raise found.refusal(weight, f"{expected}, or U8 of NF4", dtype.value)
    if dtype in _FLOAT8 and _SCALE in parts:
        found.allow(WEIGHT, _SCALE)
        scales = TensorScales(found.grid(rows, columns), PlainScales(parts[_SCALE]))
        return Encoding(weight, FILE_FORMATS[dtype], rows, columns, scales)
    found.allow(WEIGHT)
    return Encoding(weight, FILE_FORMATS[dtype], rows, columns)


class _Parts:
    """A tensor's parts, each held against what its format says of it."""

    def __init__(self, parts: Mapping[str, StoredTensor], read: ReadSmall) -> None:
        self._parts = parts
        self._read = read

    def refusal(self, stored: StoredTensor, expected: str, got: object) -> AdapterInvalid:
        """What the tensor should be, and is: a text as it stands, anything else shortened."""
        text = got if isinstance(got, str) else shorten(got)
        return AdapterInvalid(
            f"{stored.file_name}: tensor {shorten(stored.tensor.name, 160)}: expected {expected},"
            f" got {text}"
        )

    def allow(self, *names: str) -> None:
        """Raises if there is any other part."""
        for name, stored in self._parts.items():
            if name not in names:
                raise AdapterInvalid(
                    f"{stored.file_name}: tensor {shorten(stored.tensor.name, 160)} is of no format"
                    f" that can be served beside {', '.join(sorted(set(names) & set(self._parts)))}"
                )

    def check_matrix(self, stored: StoredTensor) -> None:
        if len(stored.tensor.shape) != 2 or 0 in stored.tensor.shape:
            raise self.refusal(stored, "two dimensions, none of them 0", list(stored.tensor.shape))

    def int8(self, rows: int, columns: int) -> Encoding:
        weight = self._parts[WEIGHT]
        if _SCB in self._parts:
            self.allow(WEIGHT, _SCB, _SCB_FORMAT)
            scb = self._part(_SCB, (TensorDType.F32,), (rows,))
            if _SCB_FORMAT in self._parts:
                layout = self._part(_SCB_FORMAT, (TensorDType.U8,), None)
                if self._read(layout) != b"\0":
                    raise self.refusal(layout, "0, for rows", self._read(layout))
            grid = ScaleGrid.of_shape(rows, columns, 1, columns)
            scales = TensorScales(grid, PlainScales(scb), _SCB_FACTOR)
            return Encoding(weight, Format.INT8, rows, columns, scales)
        self.allow(WEIGHT, _SCALE, _ZEROS)
        if _SCALE not in self._parts:
            raise self.refusal(weight, f"a {_SCALE} or {_SCB} beside int8 values", "neither")
        grid, zeros = self.grid(rows, columns), None
        if _ZEROS in self._parts:
            shape = self._parts[_SCALE].tensor.shape
            zeros = self._part(_ZEROS, (TensorDType.I8,), shape)
        scales = TensorScales(grid, PlainScales(self._parts[_SCALE], zeros))
        return Encoding(weight, Format.INT8, rows, columns, scales)

    def packed_int4(self) -> Encoding:
        self.allow(PACKED, _SCALE, _SHAPE, _ZEROS)
        packed = self._part(PACKED, (TensorDType.I32,), None)
        self.check_matrix(packed)
        shape = self._part(_SHAPE, (TensorDType.I32, TensorDType.I64), (2,))
        width = np.dtype("<i4" if shape.tensor.dtype is TensorDType.I32 else "<i8")
        rows, columns = np.frombuffer(self._read(shape), width).tolist()
        if columns < 1 or (rows, -(-columns // Format.INT4.unit_values)) != packed.tensor.shape:
            raise self.refusal(
                shape, f"[r, c] with k = ceil(c / 8) for {PACKED} [r, k]", f"{[rows, columns]}"
            )
        grid, zeros = self.grid(rows, columns), None
        if _ZEROS in self._parts:
            zeros = self._zeros_of_int4(rows)
        scales = TensorScales(grid, PlainScales(self._parts[_SCALE], zeros))
        return Encoding(packed, Format.INT4, rows, columns, scales)

    def _zeros_of_int4(self, rows: int) -> StoredTensor | PackedZeros:
        """Packed ones beside scales for each row or for parts of it; one alone is not packed."""
        scale = self._parts[_SCALE]
        if scale.tensor.shape in _ONE and self._parts[_ZEROS].tensor.dtype is TensorDType.I8:
            return self._part(_ZEROS, (TensorDType.I8,), scale.tensor.shape)
        if len(scale.tensor.shape) != 2 or scale.tensor.shape[0] != rows:
            raise self.refusal(
                scale, f"shape [{rows}, n] beside packed zeros", list(scale.tensor.shape)
            )
        shape = (-(-rows // Format.INT4.unit_values), scale.tensor.shape[1])
        return PackedZeros(self._part(_ZEROS, (TensorDType.I32,), shape), rows)

    def grid(self, rows: int, columns: int) -> ScaleGrid:
        """Which values share a scale, as the shape of ``P.weight_scale`` tells."""
        scale = self._part(_SCALE, FLOAT_DTYPES, None)
        blocks = (-(-rows // _BLOCK), -(-columns // _BLOCK))
        match scale.tensor.shape:
            case shape if shape in _ONE:
                return ScaleGrid.of_shape(rows, columns, rows, columns)
            case (count,) if count == rows:
                return ScaleGrid.of_shape(rows, columns, 1, columns)
            case (tall, wide) if tall == rows and wide and columns % wide == 0:
                # Of one row, whose blocks lie as its parts do.
                if (tall, wide) == blocks and columns != wide * _BLOCK:
                    raise self.refusal(
                        scale,
                        f"scales that are clearly for {columns // wide} values each, or for"
                        f" {_BLOCK}",
                        [tall, wide],
                    )
                return ScaleGrid.of_shape(rows, columns, 1, columns // wide)
            case shape if shape == blocks:
                return ScaleGrid.of_shape(rows, columns, _BLOCK, _BLOCK)
        raise self.refusal(
            scale,
            f"one scale for {[rows, columns]}, for each row, for equal parts of rows, or for each"
            f" block of {_BLOCK} x {_BLOCK}",
            list(scale.tensor.shape),
        )

    def nf4(self) -> Encoding:
        nested = _OUTER in self._parts
        self.allow(WEIGHT, _ABSMAX, _CODE, _STATE, *((_OUTER, _OUTER_CODE) if nested else ()))
        weight = self._part(WEIGHT, _NF4_STORAGE, None)
        state = self._part(_STATE, (TensorDType.U8,), None)
        fields = strict_json.parse(self._read(state), state.tensor.name)
        if not isinstance(fields, dict) or fields.get("quant_type") != "nf4":
            raise self.refusal(state, "an object whose quant_type is nf4", fields)
        shape, length = fields.get("shape"), fields.get("blocksize")
        if not _is_shape(shape) or type(length) is not int or length < 1:
            raise self.refusal(state, "shape [rows, columns] and a blocksize", fields)
        rows, columns = shape
        if Format.NF4.num_bytes(rows * columns) != weight.tensor.num_bytes:
            raise self.refusal(
                weight,
                f"{rows * columns} values in halves of bytes",
                f"{weight.tensor.num_bytes} bytes",
            )
        if columns % 2 and 2 * columns > TILE_VALUES:
            raise self.refusal(
                state, f"an even number of columns, or at most {TILE_VALUES // 2}", str(columns)
            )
        code = self._part(_CODE, (TensorDType.F32,), (16,))
        if self._read(code) != NF4_VALUES.tobytes():
            raise self.refusal(code, "the sixteen values of NF4", "others")
        num_blocks = -(-rows * columns // length)
        grid = ScaleGrid.of_runs(rows * columns, length)
        if not nested:
            plain = PlainScales(self._part(_ABSMAX, (TensorDType.F32,), (num_blocks,)))
            return Encoding(weight, Format.NF4, rows, columns, TensorScales(grid, plain))
        outer_length, offset = fields.get("nested_blocksize"), fields.get("nested_offset")
        if not (type(outer_length) is int and outer_length > 0 and _is_finite(offset)):
            raise self.refusal(state, "a nested_blocksize and a nested_offset", fields)
        num_outer = -(-num_blocks // outer_length)
        source = NestedScales(
            self._part(_ABSMAX, (TensorDType.U8,), (num_blocks,)),
            self._part(_OUTER_CODE, (TensorDType.F32,), (256,)),
            self._part(_OUTER, (TensorDType.F32,), (num_outer,)),
            outer_length,
            offset,
        )
        return Encoding(weight, Format.NF4, rows, columns, TensorScales(grid, source))

    def _part(
        self, name: str, dtypes: tuple[TensorDType, ...], shape: tuple[int, ...] | None
    ) -> StoredTensor:
        """The part of this name, of one of these dtypes and of this shape, or of any."""
        stored = self._parts.get(name)
        if stored is None:
            other = next(iter(self._parts.values()))
            raise self.refusal(other, f"a {name} beside it", "none")
        if stored.tensor.dtype not in dtypes:
            expected = " or ".join(dtype.value for dtype in dtypes)
            raise self.refusal(stored, expected, stored.tensor.dtype.value)
        if shape is not None and stored.tensor.shape != shape:
            raise self.refusal(stored, f"shape {list(shape)}", list(stored.tensor.shape))
        return stored


def _is_finite(value: object) -> TypeGuard[float]:
    return type(value) is float and math.isfinite(value)


def _is_shape(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(extent) is int and 0 < extent < 1 << 32 for extent in value)
