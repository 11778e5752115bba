"""``out = g ⊙ (out + s · (x Aᵀ) Bᵀ) + bias`` for segments of many rows, as in prefill."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.kernels.whole_numbers import next_power_of_2
from engine.lora.kernels.own_columns import add_bias, scale_columns
from engine.lora.kernels.shapes import GroupShape, Scratch, Weights
from ipc.base_model import LINEAR_MODULES

_NUM_LINEARS = tl.constexpr(len(LINEAR_MODULES))


@dataclass(frozen=True, slots=True)
class ExpandManyTuning:
    """How the work is cut up: tiles of a step's ``tile_rows`` by ``tile_columns`` of ``out``.

    A multiprocessor has memory for two programs where a tile has up to ``narrow_ranks``, and
    registers for them if neither takes more than ``narrow_registers``.
    """

    tile_columns: int = 128
    max_tile_ranks: int = 64
    narrow_ranks: int = 16
    narrow_registers: int | None = 128
    num_warps: int = 8
    num_stages: int = 3


def expand_many(
    out: Tensor,
    weights: Weights,
    scratch: Scratch,
    tiles: Tensor,
    tile_rows: int,
    group: GroupShape,
    layer: int,
    max_rank: int,
    tuning: ExpandManyTuning,
) -> None:
    """Adds the delta of every row of ``tiles`` to ``out``, for all linears of ``group``.

    ``out`` is ``[num_rows, out_features]``, contiguous, the model's dtype. ``scratch.shrunk`` holds
    what ``shrink_many`` left for the same tiles, group and layer. Where an adapter has a row scale
    or a bias for a linear, the sum is scaled, then the bias added. All of it in fp32, rounded once.
    The other arguments are those of ``shrink_many``.
    """
    assert out.is_contiguous() and out.dtype == weights.arena.dtype, out.stride()
    ends = group.column_blocks(tuning.tile_columns)
    tile_ranks = min(tuning.max_tile_ranks, max(16, next_power_of_2(max_rank)))
    launch(
        _expand_many_kernel,
        (tiles.shape[0], ends[2]),
        out,
        weights.arena,
        weights.row_scales,
        weights.offsets,
        weights.ranks,
        weights.scalings,
        tiles,
        scratch.shrunk,
        layer,
        weights.offsets.shape[1],
        group.first_module,
        ends[0],
        ends[1],
        *group.starts[1:],
        *group.widths,
        out.shape[1],
        COLUMNS=scratch.columns,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tuning.tile_columns,
        TILE_RANKS=tile_ranks,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.narrow_registers if tile_ranks <= tuning.narrow_ranks else None,
    )


@triton.jit(do_not_specialize=["layer", "num_layers", "first_module", "end_0", "end_1"])
def _expand_many_kernel(
    out_ptr,
    arena_ptr,
    row_scales_ptr,
    offsets_ptr,
    ranks_ptr,
    scalings_ptr,
    tiles_ptr,
    shrunk_ptr,
    layer,
    num_layers,
    first_module,
    end_0,
    end_1,
    start_1,
    start_2,
    width_0,
    width_1,
    width_2,
    out_stride,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
):
    """One tile of rows, some columns of one linear."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    index = tl.load(tiles_ptr + tile * 4)
    first_row = tl.load(tiles_ptr + tile * 4 + 1).to(tl.int64)
    num_rows = tl.load(tiles_ptr + tile * 4 + 2)
    module = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32)
    record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module + module
    num_ranks = tl.load(ranks_ptr + record * 16 + 6)
    if (num_ranks == 0) | (num_rows == 0):
        return
    b_offset = tl.load(offsets_ptr + record * 8 + 1)
    first_rank = tl.load(ranks_ptr + record * 16 + 5)
    scaling = tl.load(scalings_ptr + record * 16 + 7)
    row_scale = tl.load(offsets_ptr + record * 8 + 4)
    bias = tl.load(offsets_ptr + record * 8 + 5)
    start = tl.where(module == 0, 0, tl.where(module == 1, start_1, start_2))
    width = tl.where(module == 0, width_0, tl.where(module == 1, width_1, width_2))
    block -= tl.where(module == 0, 0, tl.where(module == 1, end_0, end_1))

    num_ranks = tl.multiple_of(num_ranks, 8)
    rows = tl.arange(0, TILE_ROWS)
    columns = block * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    ranks = tl.arange(0, TILE_RANKS)
    out_ptrs = out_ptr + (first_row + rows)[:, None] * out_stride + (start + columns)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    before = tl.load(out_ptrs, mask=mask, other=0.0)

    # Beyond the last row or column its values are read once more; the results go nowhere.
    s_rows = first_row + tl.minimum(rows, num_rows - 1)
    s_ptr = shrunk_ptr + tl.multiple_of(first_rank, 8)
    s_ptrs = s_ptr + s_rows[:, None] * COLUMNS + ranks[None, :]
    b_ptr = arena_ptr + tl.multiple_of(b_offset, 32)
    b_ptrs = b_ptr + tl.minimum(columns, width - 1)[None, :] * num_ranks + ranks[:, None]
    delta = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)
    for first in range(0, num_ranks, TILE_RANKS):
        valid = first + ranks < num_ranks
        shrunk = tl.load(s_ptrs + first, mask=valid[None, :], other=0.0)
        b = tl.load(b_ptrs + first, mask=valid[:, None], other=0.0)
        delta = tl.dot(shrunk, b, delta, input_precision="ieee")
    after = before.to(tl.float32) + scaling * delta
    first_column = block * TILE_COLUMNS
    after = scale_columns(after, row_scales_ptr, row_scale, first_column, width, TILE_COLUMNS)
    after = add_bias(after, arena_ptr, bias, first_column, width, TILE_COLUMNS)
    tl.store(out_ptrs, after.to(out_ptr.dtype.element_ty), mask)
