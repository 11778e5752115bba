"""``g ⊙ (out + s · (x Aᵀ) Bᵀ) + bias`` for segments of few rows, or what that adds to ``out``.

It is bound by reading the B's once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.lora.kernels.own_columns import add_bias, scale_columns
from engine.lora.kernels.shapes import GroupShape, Scratch, Weights
from engine.lora.work import EXPAND_WORD, UNIT_WORDS
from ipc.base_model import LINEAR_MODULES

_UNIT_WORDS = tl.constexpr(UNIT_WORDS)
_EXPAND_WORD = tl.constexpr(EXPAND_WORD)
_NUM_LINEARS = tl.constexpr(len(LINEAR_MODULES))


@dataclass(frozen=True, slots=True)
class ExpandFewTuning:
    """How the work is cut up: see ``UnitShape`` for ``ranks``, and for ``columns`` the first half
    of which is for one row, the other for several.

    Registers bound how many programs a multiprocessor has, and so how many bytes are on their way.
    """

    ranks: tuple[int, int, int] = (16, 64, 256)
    columns: tuple[int, int, int, int, int, int] = (512, 128, 32, 128, 128, 64)
    programs_per_processor: int = 4
    num_warps: int = 4
    max_registers: int | None = 128


def expand_few(
    out: Tensor,
    weights: Weights,
    scratch: Scratch,
    units: Tensor,
    group: GroupShape,
    layer: int,
    num_splits: int,
    max_rows: int,
    tile_rows: int,
    num_processors: int,
    tuning: ExpandFewTuning,
    overlaps: bool,
    adds: bool = True,
) -> None:
    """Adds the delta of every row of ``units`` to ``out``, for all linears of ``group``.

    ``out`` is ``[num_rows, out_features]``, contiguous, the model's dtype. ``scratch`` holds what
    ``shrink_few`` left for the same rows, group and layer, ``num_splits`` partial sums for each
    row that is alone. Where an adapter has a row scale or a bias for a linear, the sum is scaled,
    then the bias added. All of it in fp32, rounded once. The other arguments are those of
    ``shrink_few``.

    Unless it ``adds``, ``out`` is fp32 and gets delta and bias instead, whatever it held: zeros in
    the columns of a linear that a row's adapter has nothing for. Rows of no unit are kept. Then no
    adapter in ``units`` may have row scales: what they apply to is not there.
    """
    assert out.is_contiguous(), out.stride()
    assert out.dtype == (weights.arena.dtype if adds else torch.float32), out.dtype
    blocks = group.column_blocks(max(tuning.columns))
    max_items = (units.shape[0] - 1) * blocks[2]
    num_programs = min(max_items, tuning.programs_per_processor * num_processors)
    launch(
        _expand_few_kernel,
        (num_programs,),
        out,
        weights.arena,
        weights.row_scales,
        weights.offsets,
        weights.ranks,
        weights.scalings,
        units,
        scratch.partial,
        scratch.shrunk,
        layer,
        weights.offsets.shape[1],
        group.first_module,
        *blocks,
        *group.starts[1:],
        *group.widths,
        out.shape[1],
        max_rows,
        SCRATCH_COLUMNS=scratch.columns,
        NUM_SPLITS=num_splits,
        RANKS=tuning.ranks,
        COLUMNS=tuning.columns,
        MAX_COLUMNS=max(tuning.columns),
        TILE_ROWS=tile_rows,
        ADDS=adds,
        OVERLAPS=overlaps,
        num_warps=tuning.num_warps,
        num_stages=1,
        maxnreg=tuning.max_registers,
        launch_pdl=overlaps,
    )


@triton.jit(
    do_not_specialize=["layer", "num_layers", "first_module", "end_0", "end_1", "end_2", "max_rows"]
)
def _expand_few_kernel(
    out_ptr,
    arena_ptr,
    row_scales_ptr,
    offsets_ptr,
    ranks_ptr,
    scalings_ptr,
    units_ptr,
    partial_ptr,
    shrunk_ptr,
    layer,
    num_layers,
    first_module,
    end_0,
    end_1,
    end_2,
    start_1,
    start_2,
    width_0,
    width_1,
    width_2,
    out_stride,
    max_rows,
    SCRATCH_COLUMNS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program by program: some columns of one linear, all their ranks, all rows of a unit."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    item = tl.program_id(0)
    # The first unit is read before it is known that there are so many: the list has room for it.
    unit_ptr = units_ptr + (1 + item // end_2) * _UNIT_WORDS + _EXPAND_WORD
    index = tl.load(unit_ptr)
    first_row = tl.load(unit_ptr + 1)
    num_rows = tl.load(unit_ptr + 2)
    scratch_row = tl.load(unit_ptr + 3)
    unit = tl.load(unit_ptr + 4)
    variant = tl.load(unit_ptr + 5)
    num_items = tl.load(units_ptr + 2) * end_2
    while item < num_items:
        block = item % end_2
        module = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32)
        record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module + module
        b_offset = tl.load(offsets_ptr + record * 8 + 1)
        first_rank = tl.load(ranks_ptr + record * 16 + 5)
        num_ranks = tl.load(ranks_ptr + record * 16 + 6)
        scaling = tl.load(scalings_ptr + record * 16 + 7)
        row_scale = tl.load(offsets_ptr + record * 8 + 4)
        bias = tl.load(offsets_ptr + record * 8 + 5)
        start = tl.where(module == 0, 0, tl.where(module == 1, start_1, start_2))
        width = tl.where(module == 0, width_0, tl.where(module == 1, width_1, width_2))
        block -= tl.where(module == 0, 0, tl.where(module == 1, end_0, end_1))

        item += tl.num_programs(0)
        unit_ptr = units_ptr + (1 + item // end_2) * _UNIT_WORDS + _EXPAND_WORD
        more = item < num_items
        index = tl.load(unit_ptr, mask=more, other=0)
        next_first_row = tl.load(unit_ptr + 1, mask=more, other=0)
        next_num_rows = tl.load(unit_ptr + 2, mask=more, other=0)
        next_scratch_row = tl.load(unit_ptr + 3, mask=more, other=0)
        next_unit = tl.load(unit_ptr + 4, mask=more, other=0)
        next_variant = tl.load(unit_ptr + 5, mask=more, other=0)

        # Of no ranks at all, the delta is zero: it has to be written where nothing is added.
        if (num_ranks > 0) | (not ADDS):
            num_ranks = tl.multiple_of(num_ranks, 8)
            first_rank = tl.multiple_of(first_rank, 8)
            b_ptr = arena_ptr + tl.multiple_of(b_offset, 32)
            p_ptr = partial_ptr + scratch_row * SCRATCH_COLUMNS + first_rank
            s_ptr = shrunk_ptr + first_row.to(tl.int64) * SCRATCH_COLUMNS + first_rank
            o_ptr = out_ptr + first_row.to(tl.int64) * out_stride + start
            split_stride = (max_rows * SCRATCH_COLUMNS).to(tl.int64)
            column = block * MAX_COLUMNS
            for size in tl.static_range(len(RANKS)):
                if variant == size:
                    _expand_row(
                        o_ptr,
                        b_ptr,
                        arena_ptr,
                        row_scales_ptr,
                        p_ptr,
                        column + unit * COLUMNS[size],
                        width,
                        num_ranks,
                        scaling,
                        row_scale,
                        bias,
                        split_stride,
                        NUM_SPLITS,
                        RANKS[size],
                        COLUMNS[size],
                        ADDS,
                        OVERLAPS,
                    )
                elif variant == len(RANKS) + size:
                    _expand_rows(
                        o_ptr,
                        b_ptr,
                        arena_ptr,
                        row_scales_ptr,
                        s_ptr,
                        column + unit * COLUMNS[len(RANKS) + size],
                        width,
                        num_rows,
                        num_ranks,
                        scaling,
                        row_scale,
                        bias,
                        out_stride,
                        SCRATCH_COLUMNS,
                        RANKS[size],
                        COLUMNS[len(RANKS) + size],
                        TILE_ROWS,
                        ADDS,
                        OVERLAPS,
                    )
        first_row = next_first_row
        num_rows = next_num_rows
        scratch_row = next_scratch_row
        unit = next_unit
        variant = next_variant
    if OVERLAPS:
        # Else a launch without work would let the next one overtake the one before.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _expand_row(
    out_ptr,
    b_ptr,
    arena_ptr,
    row_scales_ptr,
    partial_ptr,
    first_column,
    width,
    num_ranks,
    scaling,
    row_scale,
    bias,
    split_stride,
    NUM_SPLITS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    columns = first_column + tl.arange(0, TILE_COLUMNS)
    ranks = tl.arange(0, TILE_RANKS)
    b = _load_b(b_ptr, columns, width, ranks, num_ranks)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    mask = columns < width
    if ADDS:
        before = tl.load(out_ptr + columns, mask=mask, other=0.0)
    # One by one: each thread loads what its part of B needs, nothing has to be exchanged.
    shrunk = tl.zeros([TILE_RANKS], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        ptrs = partial_ptr + split * split_stride + ranks
        shrunk += tl.load(ptrs, mask=ranks < num_ranks, other=0.0)
    delta = tl.sum(b.to(tl.float32) * shrunk[None, :], 1)
    after = scaling * delta
    if ADDS:
        after += before.to(tl.float32)
        after = scale_columns(after, row_scales_ptr, row_scale, first_column, width, TILE_COLUMNS)
    after = add_bias(after, arena_ptr, bias, first_column, width, TILE_COLUMNS)
    tl.store(out_ptr + columns, after.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _expand_rows(
    out_ptr,
    b_ptr,
    arena_ptr,
    row_scales_ptr,
    shrunk_ptr,
    first_column,
    width,
    num_rows,
    num_ranks,
    scaling,
    row_scale,
    bias,
    out_stride,
    SCRATCH_COLUMNS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.arange(0, TILE_ROWS)
    columns = first_column + tl.arange(0, TILE_COLUMNS)
    ranks = tl.arange(0, TILE_RANKS)
    b = _load_b(b_ptr, columns, width, ranks, num_ranks)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    if ADDS:
        before = tl.load(out_ptrs, mask=mask, other=0.0)
    shrunk = tl.load(
        shrunk_ptr + rows[:, None] * SCRATCH_COLUMNS + ranks[None, :],
        mask=(rows < num_rows)[:, None] & (ranks < num_ranks)[None, :],
        other=0.0,
    )
    delta = tl.dot(shrunk, tl.trans(b), input_precision="ieee")
    after = scaling * delta
    if ADDS:
        after += before.to(tl.float32)
        after = scale_columns(after, row_scales_ptr, row_scale, first_column, width, TILE_COLUMNS)
    after = add_bias(after, arena_ptr, bias, first_column, width, TILE_COLUMNS)
    tl.store(out_ptrs, after.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _load_b(b_ptr, columns, width, ranks, num_ranks):
    """``[columns, ranks]`` of B, zeros outside of it."""
    return tl.load(
        b_ptr + columns[:, None] * num_ranks + ranks[None, :],
        mask=(columns < width)[:, None] & (ranks < num_ranks)[None, :],
        other=0.0,
    )
