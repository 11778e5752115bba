"""``x Aᵀ`` for segments of few rows, as in decoding: bound by reading the A's once.

One row's products are sums that every thread takes a part of, from A's in its registers. Several
rows' are matrix products, from a first tile of A in registers and others that stream through shared
memory. What comes first is on its way before ``x`` is there: beside the base model's product, which
takes all of the memory's bandwidth, each load would be waited for three times as long.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.kernels.split_sum import is_last_arrival, load_part
from engine.lora.kernels.shapes import GroupShape, Scratch, Weights
from engine.lora.work import SHRINK_ROW_WORD, SHRINK_ROWS_WORD, UNIT_WORDS
from ipc.base_model import LINEAR_MODULES

_UNIT_WORDS = tl.constexpr(UNIT_WORDS)
_ROW_WORD = tl.constexpr(SHRINK_ROW_WORD)
_ROWS_WORD = tl.constexpr(SHRINK_ROWS_WORD)
_NUM_LINEARS = tl.constexpr(len(LINEAR_MODULES))


@dataclass(frozen=True, slots=True)
class ShrinkFewTuning:
    """How the work is cut up.

    For one row, a program has ``row_ranks`` by ``row_inputs`` of A in its registers, and the inputs
    are split so that there are at most ``row_splits`` partial sums. For several rows, a tile of A
    is ``rows_ranks`` high and read ``rows_inputs`` (in half precision) at a time; the inputs are
    split in up to ``rows_splits`` parts, until there are ``rows_fill`` tiles for each
    multiprocessor: adding up the parts costs as much as reading some hundred kilobytes.

    ``num_stages`` of them in shared memory leave room for three of these programs and one that
    expands, which so has its B's before the last of them has ended.
    """

    row_ranks: int = 16
    row_inputs: int = 1024
    row_splits: int = 16
    rows_ranks: int = 32
    rows_inputs: int = 256
    rows_splits: int = 32
    rows_fill: float = 3.0
    programs_per_processor: int = 4
    num_warps: int = 4
    num_stages: int = 4
    max_registers: int | None = 128

    def cut_row(self, in_features: int) -> tuple[int, int]:
        """``(num_splits, tiles of each)`` of one row's inputs."""
        num_tiles = -(-in_features // self.row_inputs)
        num_chunks = -(-num_tiles // self.row_splits)
        return -(-num_tiles // num_chunks), num_chunks


def shrink_few(
    x: Tensor,
    weights: Weights,
    scratch: Scratch,
    units: Tensor,
    group: GroupShape,
    layer: int,
    max_rows: int,
    tile_rows: int,
    num_processors: int,
    tuning: ShrinkFewTuning,
    overlaps: bool,
) -> None:
    """``x Aᵀ`` of every row of ``units``, for all linears of ``group``, into ``scratch``.

    | tensor  | shape                           | dtype                                        |
    |---------|---------------------------------|----------------------------------------------|
    | `x`     | `[num_rows, in]`, contiguous    | the model's                                  |
    | `units` | `[1 + max_units, UNIT_WORDS]`   | int32, see ``list_units``; ``tile_rows`` high |

    The grid depends on the sizes of ``units`` and ``group`` alone. ``max_rows`` is how many rows
    the segments have at most, all together. Sums are fp32, in an order that depends on the number
    of units alone.

    Where ``overlaps``, the launch may begin before the last one on the stream is done; it waits
    for that with its first look at ``x`` or ``scratch``, and has the first of each program's A's in
    its registers by then.
    """
    assert x.is_contiguous() and x.shape[1] == group.in_features, (x.shape, group)
    assert x.dtype == weights.arena.dtype == scratch.shrunk.dtype, x.dtype
    num_splits, num_chunks = tuning.cut_row(group.in_features)
    # The stages' tiles have to fit into shared memory in fp32, too.
    rows_inputs = tuning.rows_inputs * 2 // x.element_size()
    max_tiles = (units.shape[0] - 1) * group.num_modules
    max_splits = max(num_splits, tuning.rows_splits)
    num_programs = min(max_tiles * max_splits, tuning.programs_per_processor * num_processors)
    rows_partial = num_splits * max_rows * scratch.columns
    num_parts = num_programs * tile_rows * tuning.rows_ranks
    assert rows_partial + num_parts <= scratch.partial.numel(), (rows_partial, num_parts)
    assert max_tiles <= scratch.arrivals.numel(), max_tiles
    launch(
        _shrink_few_kernel,
        (num_programs,),
        x,
        weights.arena,
        weights.offsets,
        weights.ranks,
        units,
        scratch.partial,
        scratch.partial[rows_partial:],
        scratch.shrunk,
        scratch.arrivals,
        layer,
        weights.offsets.shape[1],
        group.first_module,
        group.num_modules,
        max_rows,
        min(num_programs, round(tuning.rows_fill * num_processors)),
        units.shape[0] - 2,
        IN_FEATURES=group.in_features,
        COLUMNS=scratch.columns,
        ROW_RANKS=tuning.row_ranks,
        ROW_INPUTS=tuning.row_inputs,
        ROW_SPLITS=num_splits,
        ROW_CHUNKS=num_chunks,
        TILE_ROWS=tile_rows,
        ROWS_RANKS=tuning.rows_ranks,
        ROWS_INPUTS=rows_inputs,
        ROWS_SPLITS=tuning.rows_splits,
        NUM_STAGES=tuning.num_stages,
        OVERLAPS=overlaps,
        num_warps=tuning.num_warps,
        maxnreg=tuning.max_registers,
        launch_pdl=overlaps,
    )


@triton.jit(
    do_not_specialize=[
        "layer",
        "num_layers",
        "first_module",
        "num_modules",
        "max_rows",
        "num_filled",
        "last_unit",
    ]
)
def _shrink_few_kernel(
    x_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    units_ptr,
    row_partial_ptr,
    rows_partial_ptr,
    shrunk_ptr,
    arrivals_ptr,
    layer,
    num_layers,
    first_module,
    num_modules,
    max_rows,
    num_filled,
    last_unit,
    IN_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_RANKS: tl.constexpr,
    ROW_INPUTS: tl.constexpr,
    ROW_SPLITS: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS_RANKS: tl.constexpr,
    ROWS_INPUTS: tl.constexpr,
    ROWS_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program by program: a tile of ranks, a split of the inputs, all rows of a unit."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    NUM_STEPS: tl.constexpr = (IN_FEATURES + ROWS_INPUTS - 1) // ROWS_INPUTS
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)

    item = program
    # The first unit is read before it is known that there are so many. Where units of several rows
    # are split more often than those of one, there are programs beyond the list's end.
    first_unit = tl.minimum(item // ROW_SPLITS // num_modules, last_unit)
    unit_ptr = units_ptr + (1 + first_unit) * _UNIT_WORDS + _ROW_WORD
    index = tl.load(unit_ptr)
    row = tl.load(unit_ptr + 1)
    scratch_row = tl.load(unit_ptr + 3)
    unit = tl.load(unit_ptr + 4)
    num_items = tl.load(units_ptr) * num_modules * ROW_SPLITS
    while item < num_items:
        third = item // ROW_SPLITS % num_modules
        split = item % ROW_SPLITS
        first_rank = (unit * num_modules + third) * ROW_RANKS
        record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module
        num_ranks = tl.load(ranks_ptr + record * 16 + 4)
        a_offset = tl.load(offsets_ptr + record * 8)

        item += num_programs
        unit_ptr = units_ptr + (1 + item // ROW_SPLITS // num_modules) * _UNIT_WORDS + _ROW_WORD
        more = item < num_items
        index = tl.load(unit_ptr, mask=more, other=0)
        next_row = tl.load(unit_ptr + 1, mask=more, other=0)
        next_scratch_row = tl.load(unit_ptr + 3, mask=more, other=0)
        unit = tl.load(unit_ptr + 4, mask=more, other=0)

        if first_rank < num_ranks:
            _shrink_row(
                x_ptr + row.to(tl.int64) * IN_FEATURES,
                arena_ptr + tl.multiple_of(a_offset, 32),
                row_partial_ptr + scratch_row * COLUMNS + split * (max_rows * COLUMNS).to(tl.int64),
                first_rank,
                num_ranks,
                split,
                IN_FEATURES,
                ROW_RANKS,
                ROW_INPUTS,
                ROW_SPLITS,
                ROW_CHUNKS,
                OVERLAPS,
            )
        row = next_row
        scratch_row = next_scratch_row

    # The lists are shared out as if they were one: so the first programs, which find room first,
    # have work.
    item -= num_items
    num_tiles = tl.load(units_ptr + 1) * num_modules
    num_splits = tl.minimum(tl.maximum(num_filled // tl.maximum(num_tiles, 1), 1), ROWS_SPLITS)
    split_steps = tl.cdiv(NUM_STEPS, num_splits)
    # So that none of them is empty.
    num_splits = tl.cdiv(NUM_STEPS, split_steps)
    num_items = num_tiles * num_splits
    if item < num_items:
        index, first_row, num_rows, unit = _read_rows_unit(
            units_ptr, item // num_splits // num_modules
        )
        while item < num_items:
            tile = item // num_splits
            first_rank = (unit * num_modules + tile % num_modules) * ROWS_RANKS
            first_step = item % num_splits * split_steps
            record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module
            num_ranks = tl.load(ranks_ptr + record * 16 + 4)
            # The compiler keeps no hint to a value that comes from the last turn of a loop.
            a_offset = tl.load(offsets_ptr + record * 8) // 32 * 32
            if first_rank < num_ranks:
                _shrink_rows(
                    x_ptr + first_row.to(tl.int64) * IN_FEATURES,
                    arena_ptr + a_offset,
                    rows_partial_ptr,
                    shrunk_ptr + first_row.to(tl.int64) * COLUMNS,
                    arrivals_ptr + tile,
                    num_rows,
                    first_rank,
                    num_ranks,
                    tile,
                    first_step,
                    tl.minimum(first_step + split_steps, NUM_STEPS),
                    item % num_splits,
                    num_splits,
                    IN_FEATURES,
                    COLUMNS,
                    TILE_ROWS,
                    ROWS_RANKS,
                    ROWS_INPUTS,
                    ROWS_SPLITS,
                    NUM_STAGES,
                    OVERLAPS,
                )
            item += num_programs
            if item < num_items:
                index, first_row, num_rows, unit = _read_rows_unit(
                    units_ptr, item // num_splits // num_modules
                )
    if OVERLAPS:
        # Also without work: else the next launch would overtake the one before.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _read_rows_unit(units_ptr, number):
    unit_ptr = units_ptr + (1 + number) * _UNIT_WORDS + _ROWS_WORD
    index = tl.load(unit_ptr)
    first_row = tl.load(unit_ptr + 1)
    num_rows = tl.load(unit_ptr + 2)
    unit = tl.load(unit_ptr + 4)
    return index, first_row, num_rows, unit


@triton.jit
def _shrink_row(
    x_ptr,
    a_ptr,
    result_ptr,
    first_rank,
    num_ranks,
    split,
    IN_FEATURES: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    IS_RAGGED: tl.constexpr = IN_FEATURES != NUM_SPLITS * NUM_CHUNKS * TILE_INPUTS
    ranks = first_rank + tl.arange(0, TILE_RANKS)
    inputs = split * (NUM_CHUNKS * TILE_INPUTS) + tl.arange(0, TILE_INPUTS)
    a = _load_rows(a_ptr, ranks, num_ranks, inputs, IN_FEATURES, IS_RAGGED)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([TILE_RANKS], tl.float32)
    for chunk in range(NUM_CHUNKS):
        if chunk > 0:
            inputs += TILE_INPUTS
            a = _load_rows(a_ptr, ranks, num_ranks, inputs, IN_FEATURES, IS_RAGGED)
        # One row's x as often as A has rows: so it comes as the products want it.
        every_rank = tl.zeros([TILE_RANKS], tl.int32)
        x = _load_rows(x_ptr, every_rank, 1, inputs, IN_FEATURES, IS_RAGGED)
        total += tl.sum(a.to(tl.float32) * x.to(tl.float32), 1)
    tl.store(result_ptr + ranks, total, mask=ranks < num_ranks)


@triton.jit
def _shrink_rows(
    x_ptr,
    a_ptr,
    partial_ptr,
    shrunk_ptr,
    arrivals_ptr,
    num_rows,
    first_rank,
    num_ranks,
    tile,
    first_step,
    last_step,
    split,
    num_splits,
    IN_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    a = _load_step(a_ptr, first_rank, num_ranks, first_step, IN_FEATURES, TILE_RANKS, TILE_INPUTS)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    rows = tl.arange(0, TILE_ROWS)
    x = _load_step(x_ptr, 0, num_rows, first_step, IN_FEATURES, TILE_ROWS, TILE_INPUTS)
    sums = tl.dot(x, tl.trans(a), input_precision="ieee")
    if last_step > first_step + 1:
        for step in tl.range(first_step + 1, last_step, num_stages=NUM_STAGES):
            x = _load_step(x_ptr, 0, num_rows, step, IN_FEATURES, TILE_ROWS, TILE_INPUTS)
            a = _load_step(a_ptr, first_rank, num_ranks, step, IN_FEATURES, TILE_RANKS, TILE_INPUTS)
            sums = tl.dot(x, tl.trans(a), sums, input_precision="ieee")

    ranks = tl.arange(0, TILE_RANKS)
    shrunk_ptr += first_rank
    num_ranks -= first_rank
    shrunk_ptrs = shrunk_ptr + rows[:, None] * COLUMNS + ranks[None, :]
    mask = (rows < num_rows)[:, None] & (ranks < num_ranks)[None, :]
    if num_splits == 1:
        tl.store(shrunk_ptrs, sums.to(shrunk_ptr.dtype.element_ty), mask)
    else:
        PART: tl.constexpr = TILE_ROWS * TILE_RANKS
        part_ptrs = partial_ptr + tile * num_splits * PART
        part_ptrs += rows[:, None] * TILE_RANKS + ranks[None, :]
        tl.store(part_ptrs + split * PART, sums, mask)
        if is_last_arrival(arrivals_ptr, num_splits):
            total = tl.zeros([TILE_ROWS, TILE_RANKS], tl.float32)
            # All parts are on their way at once.
            for other in tl.static_range(MAX_SPLITS):
                is_part = (rows < tl.where(other < num_splits, num_rows, 0))[:, None]
                total += load_part(part_ptrs + other * PART, mask & is_part)
            tl.store(shrunk_ptrs, total.to(shrunk_ptr.dtype.element_ty), mask)


@triton.jit
def _load_step(
    ptr,
    first_row,
    num_rows,
    step,
    IN_FEATURES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
):
    """``[TILE_ROWS, TILE_INPUTS]`` of a matrix from ``first_row`` on, zeros outside of it."""
    rows = first_row + tl.arange(0, TILE_ROWS)
    inputs = step * TILE_INPUTS + tl.arange(0, TILE_INPUTS)
    return _load_rows(ptr, rows, num_rows, inputs, IN_FEATURES, IN_FEATURES % TILE_INPUTS != 0)


@triton.jit
def _load_rows(ptr, rows, num_rows, inputs, IN_FEATURES: tl.constexpr, IS_RAGGED: tl.constexpr):
    """``[rows, inputs]`` of a matrix, zeros outside of it."""
    mask = (rows < num_rows)[:, None]
    if IS_RAGGED:
        mask = mask & (inputs < IN_FEATURES)[None, :]
    return tl.load(ptr + rows[:, None] * IN_FEATURES + inputs[None, :], mask=mask, other=0.0)
