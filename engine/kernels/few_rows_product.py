"""``x Wᵀ + bias`` of a few rows, as in decoding: bound by reading the weights once.

A product of a library begins when the launch before it has ended, and fills its pipeline then. One
of these is on its multiprocessor by that time, with its first weights in the second-level cache; so
little of the time between two products is lost. Rows of W stand where a matrix product on Hopper
wants 64 at least, those of ``x`` where 8 are enough.

Programs share out tiles of W's rows, and the inputs of each where there are fewer tiles than room:
all programs of a launch are to run at once. The last program of a tile adds up its parts, in their
order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.kernels.prefetch import LINE_BYTES, prefetch_lines
from engine.kernels.split_sum import is_last_arrival, load_part
from engine.kernels.whole_numbers import cdiv

MAX_ROWS = 32
_MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class ProductTuning:
    """How a product is cut up; nothing of it changes the result beyond rounding.

    ``tile_inputs`` of ``tile_columns`` rows of W are read at a time, ``num_stages`` of them in
    flight. The inputs are split until there are ``fill`` programs for each multiprocessor, which
    is as many as its shared memory has room for.
    """

    tile_columns: int = 64
    tile_inputs: int = 128
    num_stages: int = 4
    fill: int = 2
    num_warps: int = 4

    def cut(self, out_features: int, in_features: int, num_processors: int) -> tuple[int, int]:
        """``(num_tiles, num_splits)``; no split is empty."""
        num_tiles = cdiv(out_features, self.tile_columns)
        num_splits = min(self.fill * num_processors // num_tiles, _MAX_SPLITS)
        return num_tiles, max(1, min(num_splits, cdiv(in_features, self.tile_inputs)))


# Measured on an H200 with the shape of Llama-3.1-8B. Up to 16 rows two programs share a
# multiprocessor; 32 rows are better off with one that has more in flight. What runs beside
# adapters' launches leaves them room.
SIXTEEN_ROWS = ProductTuning()
ALL_ROWS = ProductTuning(num_stages=7, fill=1)
BESIDE = ProductTuning()


def tuning_for(num_rows: int, overlaps: bool) -> ProductTuning:
    """What is fastest for so many rows; one that does not overlap has other launches beside it."""
    if not overlaps:
        return BESIDE
    return SIXTEEN_ROWS if num_rows <= 16 else ALL_ROWS


class ProductScratch:
    """Owns the memory for sums over a part of the inputs, for products that follow each other."""

    def __init__(self, num_processors: int, device: torch.device) -> None:
        tunings = (SIXTEEN_ROWS, ALL_ROWS, BESIDE)
        most = max(tuning.fill for tuning in tunings) * num_processors
        part = max(tuning.tile_columns for tuning in tunings) * MAX_ROWS
        self.num_processors = num_processors
        self.partial = torch.empty(most * part, device=device)
        # Zeros between launches.
        self.arrivals = torch.zeros(most, dtype=torch.int32, device=device)


def few_rows_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scratch: ProductScratch,
    tuning: ProductTuning,
    overlaps: bool,
) -> Tensor:
    """``x Wᵀ + bias``, a new tensor ``[num_rows, out]``: sums in fp32, rounded once.

    | tensor   | shape                                       | dtype                        |
    |----------|---------------------------------------------|------------------------------|
    | `x`      | `[num_rows, in]`, at most ``MAX_ROWS`` rows | fp32, fp16 or bf16           |
    | `weight` | `[out, in]`                                 | that of `x`                  |
    | `bias`   | `[out]`                                     | that of `x`                  |

    All are contiguous. With one ``tuning``, a row's result does not depend on the others, nor on
    their number.
    ``overlaps``: see ``engine.kernels.overlap``; ``scratch`` is for the launches of one stream, or
    of streams that wait for each other.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    assert weight.shape == (out_features, in_features), (x.shape, weight.shape)
    assert num_rows <= MAX_ROWS and x.dtype == weight.dtype, (x.shape, x.dtype, weight.dtype)
    assert x.is_contiguous() and weight.is_contiguous(), (x.stride(), weight.stride())
    assert bias is None or bias.shape == (out_features,), bias.shape
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    num_tiles, num_splits = tuning.cut(out_features, in_features, scratch.num_processors)
    tile_rows = 16 if num_rows <= 16 else MAX_ROWS
    num_parts = num_tiles * num_splits if num_splits > 1 else 0
    assert num_parts * tile_rows * tuning.tile_columns <= scratch.partial.numel(), num_parts
    assert num_parts <= scratch.arrivals.numel(), num_parts
    launch(
        _few_rows_product_kernel,
        (num_tiles * num_splits,),
        out,
        x,
        weight,
        bias,
        scratch.partial,
        scratch.arrivals,
        num_rows,
        in_features,
        out_features,
        num_splits,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tuning.tile_columns,
        TILE_INPUTS=tuning.tile_inputs,
        MAX_SPLITS=_MAX_SPLITS,
        NUM_STAGES=tuning.num_stages,
        IS_RAGGED=out_features % tuning.tile_columns != 0 or in_features % tuning.tile_inputs != 0,
        OVERLAPS=overlaps,
        num_warps=tuning.num_warps,
        launch_pdl=overlaps,
    )
    return out


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _few_rows_product_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    in_features,
    out_features,
    num_splits,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program ``split * num_tiles + tile``: a tile of columns, a split of the inputs, all rows."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles = tl.num_programs(0) // num_splits
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles
    num_steps = tl.cdiv(in_features, TILE_INPUTS)
    first_step = split * num_steps // num_splits
    last_step = (split + 1) * num_steps // num_splits

    first_column = tile * TILE_COLUMNS
    columns = tl.arange(0, TILE_COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    inputs = tl.arange(0, TILE_INPUTS)
    weight_ptr += first_column.to(tl.int64) * in_features
    is_row, is_column = rows < num_rows, columns < out_features - first_column
    if OVERLAPS:
        # Further tiles in advance cost more than they save: they hold up those of other programs.
        _prefetch_tile(
            weight_ptr + first_step * TILE_INPUTS,
            in_features,
            is_column,
            in_features - first_step * TILE_INPUTS,
            TILE_COLUMNS,
            TILE_INPUTS,
        )
        tl.extra.cuda.gdc_wait()
    weight_ptrs = weight_ptr + columns[:, None] * in_features + inputs[None, :]
    x_ptrs = x_ptr + rows[:, None] * in_features + inputs[None, :]
    sums = tl.zeros([TILE_COLUMNS, TILE_ROWS], tl.float32)
    for step in tl.range(first_step, last_step, num_stages=NUM_STAGES):
        start = step * TILE_INPUTS
        if IS_RAGGED:
            is_input = (inputs < in_features - start)[None, :]
            weight = tl.load(weight_ptrs + start, is_column[:, None] & is_input, other=0.0)
            x = tl.load(x_ptrs + start, is_row[:, None] & is_input, other=0.0)
        else:
            weight = tl.load(weight_ptrs + start)
            x = tl.load(x_ptrs + start, is_row[:, None], other=0.0)
        sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")

    mask = is_column[:, None] & is_row[None, :]
    if num_splits > 1:
        PART: tl.constexpr = TILE_ROWS * TILE_COLUMNS
        part_ptrs = partial_ptr + tile * num_splits * PART
        part_ptrs += rows[None, :] * TILE_COLUMNS + columns[:, None]
        tl.store(part_ptrs + split * PART, sums, mask)
        if is_last_arrival(arrivals_ptr + tile, num_splits):
            total = tl.zeros([TILE_COLUMNS, TILE_ROWS], tl.float32)
            # All parts are on their way at once.
            for other in tl.static_range(MAX_SPLITS):
                is_part = (rows < tl.where(other < num_splits, num_rows, 0))[None, :]
                total += load_part(part_ptrs + other * PART, is_column[:, None] & is_part)
            _store(out_ptr, bias_ptr, total, mask, rows, first_column + columns, out_features)
    else:
        _store(out_ptr, bias_ptr, sums, mask, rows, first_column + columns, out_features)


@triton.jit
def _store(out_ptr, bias_ptr, sums, mask, rows, columns, out_features):
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < out_features, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows[None, :].to(tl.int64) * out_features + columns[:, None]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _prefetch_tile(
    ptr, stride, is_row, num_inputs, TILE_ROWS: tl.constexpr, TILE_INPUTS: tl.constexpr
):
    """Has a tile of a matrix brought into the second-level cache."""
    LINE: tl.constexpr = LINE_BYTES // (ptr.dtype.element_ty.primitive_bitwidth // 8)
    starts = tl.arange(0, TILE_INPUTS // LINE) * LINE
    ptrs = ptr + tl.arange(0, TILE_ROWS)[:, None] * stride + starts[None, :]
    # In the place of what lies outside comes the first line once more.
    prefetch_lines(tl.where(is_row[:, None] & (starts < num_inputs)[None, :], ptrs, ptr))
