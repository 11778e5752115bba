"""``x Aᵀ`` for segments of many rows, as in prefill: a matrix product for each tile of rows."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.kernels.split_sum import is_last_arrival, load_part
from engine.kernels.whole_numbers import cdiv, next_power_of_2
from engine.lora.kernels.shapes import GroupShape, Scratch, Weights
from ipc.base_model import LINEAR_MODULES

_NUM_LINEARS = tl.constexpr(len(LINEAR_MODULES))


@dataclass(frozen=True, slots=True)
class ShrinkManyTuning:
    """How the work is cut up: tiles of ``tile_rows`` by at most ``max_ranks``.

    Of more than ``max_narrow_ranks`` they are *wide*, otherwise *narrow*: ``(inputs in half
    precision that are read at once, warps, stages of the pipeline)``. Where narrow tiles alone
    would not fill the GPU, the inputs are split, too.
    """

    tile_rows: int = 128
    max_ranks: int = 256
    max_narrow_ranks: int = 64
    max_splits: int = 8
    narrow: tuple[int, int, int] = (128, 4, 4)
    wide: tuple[int, int, int] = (64, 8, 4)

    def cut(self, num_tiles: int, num_ranks: int, num_processors: int) -> tuple[int, int]:
        """``(ranks of a tile, number of splits)`` for ``num_tiles`` tiles of rows."""
        narrow_blocks = -(-num_ranks // self.max_narrow_ranks)
        is_filled = num_tiles * narrow_blocks >= num_processors
        most = self.max_ranks if is_filled else self.max_narrow_ranks
        tile_ranks = min(most, max(16, next_power_of_2(num_ranks)))
        if is_filled:
            return tile_ranks, 1
        num_programs = num_tiles * -(-num_ranks // tile_ranks)
        return tile_ranks, max(1, min(self.max_splits, num_processors // num_programs))


def shrink_many(
    x: Tensor,
    weights: Weights,
    scratch: Scratch,
    tiles: Tensor,
    group: GroupShape,
    layer: int,
    max_rank: int,
    num_used: int,
    num_processors: int,
    tuning: ShrinkManyTuning,
) -> None:
    """``x Aᵀ`` of every row of ``tiles``, for all linears of ``group``, into ``scratch.shrunk``.

    | tensor  | shape                        | dtype                                          |
    |---------|------------------------------|------------------------------------------------|
    | `x`     | `[num_rows, in]`, contiguous | the model's                                    |
    | `tiles` | `[num_tiles, 4]`             | int32, see ``list_row_tiles``; ``tile_rows`` high |

    ``max_rank`` is the largest padded rank among the tiles' adapters. About ``num_used`` of the
    tiles have rows: for so many the work is cut up. Sums are fp32, in an order that depends on the
    numbers of tiles alone, and rounded once.
    """
    assert x.is_contiguous() and x.shape[1] == group.in_features, (x.shape, group)
    assert x.dtype == weights.arena.dtype == scratch.shrunk.dtype, x.dtype
    num_tiles = tiles.shape[0]
    num_ranks = max_rank * group.num_modules
    tile_ranks, num_splits = tuning.cut(num_used, num_ranks, num_processors)
    is_wide = tile_ranks > tuning.max_narrow_ranks
    tile_inputs, num_warps, num_stages = tuning.wide if is_wide else tuning.narrow
    # The stages' tiles have to fit into shared memory in fp32, too.
    tile_inputs = tile_inputs * 2 // x.element_size()
    rank_blocks = cdiv(num_ranks, tile_ranks)
    num_steps = cdiv(group.in_features, tile_inputs)
    part = num_tiles * tuning.tile_rows * scratch.columns
    num_splits = max(1, min(num_splits, num_steps, scratch.partial.numel() // part))
    assert num_splits == 1 or num_tiles * rank_blocks <= scratch.arrivals.numel(), num_tiles
    launch(
        _shrink_many_kernel,
        (rank_blocks, num_tiles, num_splits),
        x,
        weights.arena,
        weights.offsets,
        weights.ranks,
        tiles,
        scratch.partial,
        scratch.shrunk,
        scratch.arrivals,
        layer,
        weights.offsets.shape[1],
        group.first_module,
        cdiv(num_steps, num_splits),
        part,
        IN_FEATURES=group.in_features,
        COLUMNS=scratch.columns,
        TILE_ROWS=tuning.tile_rows,
        TILE_RANKS=tile_ranks,
        TILE_INPUTS=tile_inputs,
        IS_SPLIT=num_splits > 1,
        num_warps=num_warps,
        num_stages=num_stages,
    )


@triton.jit(do_not_specialize=["layer", "num_layers", "first_module", "split_steps", "part"])
def _shrink_many_kernel(
    x_ptr,
    arena_ptr,
    offsets_ptr,
    ranks_ptr,
    tiles_ptr,
    partial_ptr,
    shrunk_ptr,
    arrivals_ptr,
    layer,
    num_layers,
    first_module,
    split_steps,
    part,
    IN_FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_RANKS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """One tile of rows, some of its adapter's ranks, a split of the inputs."""
    tile = tl.program_id(1)
    split = tl.program_id(2)
    first_rank = tl.program_id(0) * TILE_RANKS
    index = tl.load(tiles_ptr + tile * 4)
    first_row = tl.load(tiles_ptr + tile * 4 + 1).to(tl.int64)
    num_rows = tl.load(tiles_ptr + tile * 4 + 2)
    record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module
    num_ranks = tl.load(ranks_ptr + record * 16 + 4)
    if (first_rank >= num_ranks) | (num_rows == 0):
        return
    num_ranks = tl.multiple_of(num_ranks, 8)
    a_ptr = arena_ptr + tl.multiple_of(tl.load(offsets_ptr + record * 8), 32)

    tile_rows = tl.arange(0, TILE_ROWS)
    ranks = first_rank + tl.arange(0, TILE_RANKS)
    inputs = tl.arange(0, TILE_INPUTS)
    # Beyond the last row or rank its values are read once more; the results go nowhere.
    x_rows = first_row + tl.minimum(tile_rows, num_rows - 1)
    a_rows = tl.minimum(ranks, num_ranks - 1)
    x_ptrs = x_ptr + x_rows[:, None] * IN_FEATURES + inputs[None, :]
    a_ptrs = a_ptr + a_rows[None, :] * IN_FEATURES + inputs[:, None]
    sums = tl.zeros([TILE_ROWS, TILE_RANKS], tl.float32)
    first_step = split * split_steps
    last_step = tl.minimum(first_step + split_steps, tl.cdiv(IN_FEATURES, TILE_INPUTS))
    for step in range(first_step, last_step):
        start = step * TILE_INPUTS
        if IN_FEATURES % TILE_INPUTS == 0:
            x = tl.load(x_ptrs + start)
            a = tl.load(a_ptrs + start)
        else:
            mask = start + inputs < IN_FEATURES
            x = tl.load(x_ptrs + start, mask=mask[None, :], other=0.0)
            a = tl.load(a_ptrs + start, mask=mask[:, None], other=0.0)
        sums = tl.dot(x, a, sums, input_precision="ieee")

    mask = (tile_rows < num_rows)[:, None] & (ranks < num_ranks)[None, :]
    shrunk_ptrs = shrunk_ptr + (first_row + tile_rows)[:, None] * COLUMNS + ranks[None, :]
    if not IS_SPLIT:
        tl.store(shrunk_ptrs, sums.to(shrunk_ptr.dtype.element_ty), mask)
    else:
        num_splits = tl.num_programs(2)
        offsets = (tile * TILE_ROWS + tile_rows)[:, None] * COLUMNS + ranks[None, :]
        partial_ptrs = partial_ptr + offsets
        tl.store(partial_ptrs + split * part.to(tl.int64), sums, mask)
        arrival = tile * tl.num_programs(0) + tl.program_id(0)
        if is_last_arrival(arrivals_ptr + arrival, num_splits):
            sums = tl.zeros([TILE_ROWS, TILE_RANKS], tl.float32)
            for other in range(num_splits):
                sums += load_part(partial_ptrs + other * part.to(tl.int64), mask)
            tl.store(shrunk_ptrs, sums.to(shrunk_ptr.dtype.element_ty), mask)
