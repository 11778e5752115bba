"""``x Aᵀ`` for segments of few rows, as in decoding: bound by reading the A's once."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engine.lora.kernels.shapes import GroupShape, Scratch, Weights
from engine.lora.kernels.split_sum import is_last_arrival, load_part
from engine.lora.work import UNIT_WORDS
from ipc.base_model import LINEAR_MODULES

_UNIT_WORDS = tl.constexpr(UNIT_WORDS)
_NUM_LINEARS = tl.constexpr(len(LINEAR_MODULES))


@dataclass(frozen=True, slots=True)
class ShrinkFewTuning:
    """How the work is cut up.

    A program reads a tile of ``tile_ranks`` by ``lanes * tile_inputs`` of A at once, all of it in
    registers. The inputs are split so that there are at most ``max_splits`` partial sums.
    """

    tile_ranks: int = 16
    lanes: int = 4
    tile_inputs: int = 256
    tile_rows: int = 16
    max_splits: int = 16
    programs_per_processor: int = 4
    num_warps: int = 4
    max_registers: int | None = 128

    @property
    def tile_width(self) -> int:
        """Inputs of a tile."""
        return self.lanes * self.tile_inputs

    def cut(self, in_features: int) -> tuple[int, int]:
        """``(num_splits, tiles of each)``."""
        num_tiles = -(-in_features // self.tile_width)
        num_chunks = -(-num_tiles // self.max_splits)
        return -(-num_tiles // num_chunks), num_chunks


def shrink_few(
    x: Tensor,
    weights: Weights,
    scratch: Scratch,
    units: Tensor,
    group: GroupShape,
    layer: int,
    max_rows: int,
    num_processors: int,
    tuning: ShrinkFewTuning,
    overlaps: bool,
) -> None:
    """``x Aᵀ`` of every row of ``units``, for all linears of ``group``, into ``scratch``.

    | tensor  | shape                           | dtype       |
    |---------|---------------------------------|-------------|
    | `x`     | `[num_rows, in]`, contiguous    | the model's |
    | `units` | `[1 + max_units, UNIT_WORDS]`   | int32       |

    The grid depends on the sizes of ``units`` and ``group`` alone. ``max_rows`` is how many rows
    the segments have at most, all together. Sums are fp32, in a fixed order.

    Where ``overlaps``, the launch may begin before the last one on the stream is done; it waits
    for that with its first look at ``x`` or ``scratch``.
    """
    assert x.is_contiguous() and x.shape[1] == group.in_features, (x.shape, group)
    assert x.dtype == weights.arena.dtype == scratch.shrunk.dtype, x.dtype
    num_splits, num_chunks = tuning.cut(group.in_features)
    max_tiles = (units.shape[0] - 1) * group.num_modules
    assert num_splits * max_rows * scratch.columns <= scratch.partial.numel(), num_splits
    assert max_tiles <= scratch.arrivals.numel(), max_tiles
    num_programs = min(max_tiles * num_splits, tuning.programs_per_processor * num_processors)
    _shrink_few_kernel[(num_programs,)](
        x,
        weights.arena,
        weights.offsets,
        weights.ranks,
        units,
        scratch.partial,
        scratch.shrunk,
        scratch.arrivals,
        layer,
        weights.offsets.shape[1],
        group.first_module,
        group.num_modules,
        max_rows,
        IN_FEATURES=group.in_features,
        COLUMNS=scratch.columns,
        NUM_SPLITS=num_splits,
        NUM_CHUNKS=num_chunks,
        TILE_RANKS=tuning.tile_ranks,
        LANES=tuning.lanes,
        TILE_INPUTS=tuning.tile_inputs,
        TILE_ROWS=tuning.tile_rows,
        IS_RAGGED=group.in_features != num_splits * num_chunks * tuning.tile_width,
        OVERLAPS=overlaps,
        num_warps=tuning.num_warps,
        num_stages=1,
        maxnreg=tuning.max_registers,
        launch_pdl=overlaps,
    )


@triton.jit(do_not_specialize=["layer", "num_layers", "first_module", "num_modules", "max_rows"])
def _shrink_few_kernel(
    x_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    units_ptr,
    partial_ptr,
    shrunk_ptr,
    arrivals_ptr,
    layer,
    num_layers,
    first_module,
    num_modules,
    max_rows,
    IN_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    LANES: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program by program: a tile of ranks, a split of the inputs, all rows of a segment."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    item = tl.program_id(0)
    # The first unit is read before it is known that there are so many: the list has room for it.
    unit_ptr = units_ptr + (1 + item // NUM_SPLITS // num_modules) * _UNIT_WORDS
    index = tl.load(unit_ptr)
    first_row = tl.load(unit_ptr + 1)
    num_rows = tl.load(unit_ptr + 2)
    scratch_row = tl.load(unit_ptr + 3)
    unit = tl.load(unit_ptr + 4)
    num_items = tl.load(units_ptr) * num_modules * NUM_SPLITS
    while item < num_items:
        tile = item // NUM_SPLITS
        split = item % NUM_SPLITS
        first_rank = (unit * num_modules + tile % num_modules) * TILE_RANKS
        record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module
        num_ranks = tl.load(ranks_ptr + record * 16 + 4)
        a_offset = tl.load(offsets_ptr + record * 8)

        item += tl.num_programs(0)
        unit_ptr = units_ptr + (1 + item // NUM_SPLITS // num_modules) * _UNIT_WORDS
        more = item < num_items
        index = tl.load(unit_ptr, mask=more, other=0)
        next_first_row = tl.load(unit_ptr + 1, mask=more, other=0)
        next_num_rows = tl.load(unit_ptr + 2, mask=more, other=0)
        next_scratch_row = tl.load(unit_ptr + 3, mask=more, other=0)
        unit = tl.load(unit_ptr + 4, mask=more, other=0)

        if first_rank < num_ranks:
            _shrink_tile(
                x_ptr + first_row.to(tl.int64) * IN_FEATURES,
                arena_ptr + tl.multiple_of(a_offset, 32),
                partial_ptr + scratch_row * COLUMNS,
                shrunk_ptr + first_row.to(tl.int64) * COLUMNS,
                arrivals_ptr + tile,
                num_rows,
                first_rank,
                num_ranks,
                split,
                (max_rows * COLUMNS).to(tl.int64),
                IN_FEATURES,
                COLUMNS,
                NUM_SPLITS,
                NUM_CHUNKS,
                TILE_RANKS,
                LANES,
                TILE_INPUTS,
                TILE_ROWS,
                IS_RAGGED,
                OVERLAPS,
            )
        first_row = next_first_row
        num_rows = next_num_rows
        scratch_row = next_scratch_row
    if OVERLAPS:
        # Else a launch without work would let the next one overtake the one before.
        tl.extra.cuda.gdc_wait()


@triton.jit
def _shrink_tile(
    x_ptr,
    a_ptr,
    partial_ptr,
    shrunk_ptr,
    arrivals_ptr,
    num_rows,
    first_rank,
    num_ranks,
    split,
    split_stride,
    IN_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    LANES: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    ranks = first_rank + tl.arange(0, TILE_RANKS)
    # Inputs are [LANES, TILE_INPUTS]: a product's sum over them is cut up among the warps.
    lanes = tl.arange(0, LANES) * TILE_INPUTS
    inputs = split * (NUM_CHUNKS * LANES * TILE_INPUTS)
    inputs += lanes[:, None] + tl.arange(0, TILE_INPUTS)[None, :]
    a = _load_rows(a_ptr, ranks, num_ranks, inputs, IN_FEATURES, IS_RAGGED)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    if num_rows == 1:
        total = tl.zeros([TILE_RANKS, TILE_INPUTS], tl.float32)
        for chunk in range(NUM_CHUNKS):
            if chunk > 0:
                inputs += LANES * TILE_INPUTS
                a = _load_rows(a_ptr, ranks, num_ranks, inputs, IN_FEATURES, IS_RAGGED)
            # One row's x as often as A has rows: so it comes as the products want it.
            every_rank = tl.zeros([TILE_RANKS], tl.int32)
            x = _load_rows(x_ptr, every_rank, 1, inputs, IN_FEATURES, IS_RAGGED)
            total += tl.sum(a.to(tl.float32) * x.to(tl.float32), 1)
        result_ptr = partial_ptr + split * split_stride
        tl.store(result_ptr + ranks, tl.sum(total, 1), mask=ranks < num_ranks)
    else:
        for row in range(0, num_rows, TILE_ROWS):
            rows = row + tl.arange(0, TILE_ROWS)
            sums = tl.zeros([LANES, TILE_ROWS, TILE_RANKS], tl.float32)
            for chunk in range(NUM_CHUNKS):
                chunk_inputs = inputs + chunk * (LANES * TILE_INPUTS)
                if chunk > 0 or (NUM_CHUNKS > 1 and row > 0):
                    a = _load_rows(a_ptr, ranks, num_ranks, chunk_inputs, IN_FEATURES, IS_RAGGED)
                x = _load_rows(x_ptr, rows, num_rows, chunk_inputs, IN_FEATURES, IS_RAGGED)
                right = tl.permute(a, (1, 2, 0))
                sums = tl.dot(tl.permute(x, (1, 0, 2)), right, sums, input_precision="ieee")
            total = tl.sum(sums, 0)
            offsets = rows[:, None] * COLUMNS + ranks[None, :]
            mask = (rows < num_rows)[:, None] & (ranks < num_ranks)[None, :]
            if NUM_SPLITS == 1:
                tl.store(shrunk_ptr + offsets, total.to(shrunk_ptr.dtype.element_ty), mask)
            else:
                tl.store(partial_ptr + split * split_stride + offsets, total, mask)
        if NUM_SPLITS > 1:  # noqa: SIM102 (decided when it is compiled)
            if is_last_arrival(arrivals_ptr, NUM_SPLITS):
                for row in range(0, num_rows, TILE_ROWS):
                    rows = row + tl.arange(0, TILE_ROWS)
                    offsets = rows[:, None] * COLUMNS + ranks[None, :]
                    mask = (rows < num_rows)[:, None] & (ranks < num_ranks)[None, :]
                    total = tl.zeros([TILE_ROWS, TILE_RANKS], tl.float32)
                    # All parts are on their way at once.
                    for other in tl.static_range(NUM_SPLITS):
                        total += load_part(partial_ptr + other * split_stride + offsets, mask)
                    tl.store(shrunk_ptr + offsets, total.to(shrunk_ptr.dtype.element_ty), mask)


@triton.jit
def _load_rows(ptr, rows, num_rows, inputs, IN_FEATURES: tl.constexpr, IS_RAGGED: tl.constexpr):
    """``[rows, lanes, inputs]`` of a matrix, zeros outside of it."""
    mask = (rows < num_rows)[:, None, None]
    if IS_RAGGED:
        mask = mask & (inputs < IN_FEATURES)[None, :, :]
    ptrs = ptr + rows[:, None, None] * IN_FEATURES + inputs[None, :, :]
    return tl.load(ptrs, mask=mask, other=0.0)
