"""Reads the A's and B's that a step's kernels read, tile by tile as they do, and nothing else.

What ``shrink_few`` and ``expand_few`` take beyond this is not the reading. So the lists of work are
gone through alike, tiles have their shapes, loads their widths, and a launch its grid, registers
and attributes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.lora.kernels.shapes import GroupShape, Weights
from engine.lora.launches import LoraTuning
from engine.lora.work import EXPAND_WORD, SHRINK_ROW_WORD, SHRINK_ROWS_WORD, UNIT_WORDS
from ipc.base_model import LINEAR_MODULES
from tools.adapter_reads.tiles import sum_of_b_tile, sum_of_row_tile, sum_of_rows_tile

WORD_BYTES = 4

_UNIT_WORDS = tl.constexpr(UNIT_WORDS)
_ROW_WORD = tl.constexpr(SHRINK_ROW_WORD)
_ROWS_WORD = tl.constexpr(SHRINK_ROWS_WORD)
_EXPAND_WORD = tl.constexpr(EXPAND_WORD)
_NUM_LINEARS = tl.constexpr(len(LINEAR_MODULES))


def max_programs(tuning: LoraTuning, num_processors: int) -> int:
    """Of any launch of ``read_few``."""
    shrink, expand = tuning.shrink_few, tuning.expand_few
    return num_processors * max(shrink.programs_per_processor, expand.programs_per_processor)


def read_few(
    weights: Weights,
    units: Tensor,
    checksums: Tensor,
    group: GroupShape,
    layer: int,
    num_processors: int,
    tuning: LoraTuning,
    reads_a: bool,
    reads_b: bool,
    overlaps: bool,
) -> None:
    """Reads for all units what shrinks them (``reads_a``), what expands them, or one after the
    other, and adds the 32-bit words that were read to ``checksums``, which overflows.

    ``checksums`` is ``[max_programs(tuning, num_processors)]`` int32: each program has its own. The
    other arguments are those of ``shrink_few``. A tile that is read for several units counts as
    often.
    """
    assert reads_a or reads_b
    assert checksums.dtype is torch.int32, checksums.dtype
    assert checksums.numel() >= max_programs(tuning, num_processors), checksums.numel()
    shrink, expand = tuning.shrink_few, tuning.expand_few
    num_units = units.shape[0] - 1
    num_splits, num_chunks = shrink.cut_row(group.in_features)
    blocks = group.column_blocks(max(expand.columns))
    num_programs = 0
    if reads_a:
        max_items = num_units * group.num_modules * max(num_splits, shrink.rows_splits)
        num_programs = min(max_items, shrink.programs_per_processor * num_processors)
    if reads_b:
        max_items = num_units * blocks[2]
        most = min(max_items, expand.programs_per_processor * num_processors)
        num_programs = max(num_programs, most)
    cut = shrink if reads_a else expand
    itemsize = weights.arena.element_size()
    per_word = WORD_BYTES // itemsize
    launch(
        _read_few_kernel,
        (num_programs,),
        weights.arena.view(torch.int32),
        weights.offsets,
        weights.ranks,
        units,
        checksums,
        num_units - 1,
        layer,
        weights.offsets.shape[1],
        group.first_module,
        group.num_modules,
        min(num_programs, round(shrink.rows_fill * num_processors)),
        *blocks,
        *group.widths,
        PER_WORD=per_word,
        IN_WORDS=group.in_features // per_word,
        ROW_RANKS=shrink.row_ranks,
        ROW_WORDS=shrink.row_inputs // per_word,
        ROW_SPLITS=num_splits,
        ROW_CHUNKS=num_chunks,
        ROWS_RANKS=shrink.rows_ranks,
        # In half precision, see ``shrink_few``: so many words in any other.
        ROWS_WORDS=shrink.rows_inputs // 2,
        ROWS_SPLITS=shrink.rows_splits,
        NUM_STAGES=shrink.num_stages,
        RANKS=expand.ranks,
        COLUMNS=expand.columns,
        MAX_COLUMNS=max(expand.columns),
        READS_A=reads_a,
        READS_B=reads_b,
        OVERLAPS=overlaps,
        num_warps=cut.num_warps,
        maxnreg=cut.max_registers,
        launch_pdl=overlaps,
    )


@triton.jit(
    do_not_specialize=[
        "last_unit",
        "layer",
        "num_layers",
        "first_module",
        "num_modules",
        "num_filled",
        "end_0",
        "end_1",
        "end_2",
    ]
)
def _read_few_kernel(
    words_ptr,
    offsets_ptr,
    ranks_ptr,
    units_ptr,
    checksums_ptr,
    last_unit,
    layer,
    num_layers,
    first_module,
    num_modules,
    num_filled,
    end_0,
    end_1,
    end_2,
    width_0,
    width_1,
    width_2,
    PER_WORD: tl.constexpr,
    IN_WORDS: tl.constexpr,
    ROW_RANKS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    ROW_SPLITS: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    ROWS_RANKS: tl.constexpr,
    ROWS_WORDS: tl.constexpr,
    ROWS_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAX_COLUMNS: tl.constexpr,
    READS_A: tl.constexpr,
    READS_B: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Program by program: a tile of A, or of B, after another.

    The lists are shared out as if they were one: who had one item less of the first begins with the
    second.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    NUM_STEPS: tl.constexpr = (IN_WORDS + ROWS_WORDS - 1) // ROWS_WORDS
    num_programs = tl.num_programs(0)
    item = tl.program_id(0)
    # No scalar: Triton's interpreter would not let it overflow.
    total = tl.zeros([1, 1], tl.int32)
    if READS_A:
        index, unit, _ = _read_unit(
            units_ptr + _ROW_WORD, item // ROW_SPLITS // num_modules, last_unit
        )
        num_items = tl.load(units_ptr) * num_modules * ROW_SPLITS
        while item < num_items:
            first_rank = (unit * num_modules + item // ROW_SPLITS % num_modules) * ROW_RANKS
            split = item % ROW_SPLITS
            record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module
            num_ranks = tl.load(ranks_ptr + record * 16 + 4)
            a_offset = tl.load(offsets_ptr + record * 8)
            item += num_programs
            index, unit, _ = _read_unit(
                units_ptr + _ROW_WORD, item // ROW_SPLITS // num_modules, last_unit
            )
            if first_rank < num_ranks:
                total += sum_of_row_tile(
                    words_ptr + _first_word(a_offset, PER_WORD),
                    first_rank,
                    num_ranks,
                    split,
                    IN_WORDS,
                    ROW_RANKS,
                    ROW_WORDS,
                    ROW_SPLITS,
                    ROW_CHUNKS,
                    OVERLAPS,
                )
        item -= num_items

        num_tiles = tl.load(units_ptr + 1) * num_modules
        num_splits = tl.minimum(tl.maximum(num_filled // tl.maximum(num_tiles, 1), 1), ROWS_SPLITS)
        num_splits = tl.cdiv(NUM_STEPS, tl.cdiv(NUM_STEPS, num_splits))
        num_items = num_tiles * num_splits
        tile = item // num_splits
        index, unit, _ = _read_unit(units_ptr + _ROWS_WORD, tile // num_modules, last_unit)
        record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module
        num_ranks = tl.load(ranks_ptr + record * 16 + 4)
        a_offset = tl.load(offsets_ptr + record * 8)
        while item < num_items:
            first_rank = (unit * num_modules + tile % num_modules) * ROWS_RANKS
            if first_rank < num_ranks:
                total += sum_of_rows_tile(
                    words_ptr + _first_word(a_offset, PER_WORD) + first_rank * IN_WORDS,
                    num_ranks - first_rank,
                    item % num_splits,
                    num_splits,
                    IN_WORDS,
                    ROWS_RANKS,
                    ROWS_WORDS,
                    NUM_STAGES,
                    OVERLAPS,
                )
            item += num_programs
            tile = item // num_splits
            index, unit, _ = _read_unit(units_ptr + _ROWS_WORD, tile // num_modules, last_unit)
            record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS + first_module
            num_ranks = tl.load(ranks_ptr + record * 16 + 4)
            a_offset = tl.load(offsets_ptr + record * 8)
        item -= num_items
    if READS_B:
        index, unit, variant = _read_unit(units_ptr + _EXPAND_WORD, item // end_2, last_unit)
        num_items = tl.load(units_ptr + 2) * end_2
        while item < num_items:
            block = item % end_2
            module = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32)
            record = (index.to(tl.int64) * num_layers + layer) * _NUM_LINEARS
            record += first_module + module
            b_offset = tl.load(offsets_ptr + record * 8 + 1)
            num_ranks = tl.load(ranks_ptr + record * 16 + 6)
            width = tl.where(module == 0, width_0, tl.where(module == 1, width_1, width_2))
            block -= tl.where(module == 0, 0, tl.where(module == 1, end_0, end_1))
            first_column = block * MAX_COLUMNS
            this_unit = unit
            this_variant = variant
            item += num_programs
            index, unit, variant = _read_unit(units_ptr + _EXPAND_WORD, item // end_2, last_unit)
            if num_ranks > 0:
                b_ptr = words_ptr + _first_word(b_offset, PER_WORD)
                for number in tl.static_range(len(COLUMNS)):
                    if this_variant == number:
                        total += sum_of_b_tile(
                            b_ptr,
                            first_column + this_unit * COLUMNS[number],
                            width,
                            num_ranks,
                            PER_WORD,
                            RANKS[number % len(RANKS)],
                            COLUMNS[number],
                            OVERLAPS,
                        )
    if OVERLAPS:
        # Else the next launch would overtake the one before, see ``engine.kernels.overlap``.
        tl.extra.cuda.gdc_wait()
    own = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    tl.atomic_add(checksums_ptr + own, total, sem="relaxed")


@triton.jit
def _read_unit(column_ptr, number, last_unit):
    """Its adapter's index, which one it is, how large; of a number beyond the list, the last."""
    unit_ptr = column_ptr + (1 + tl.minimum(number, last_unit)) * _UNIT_WORDS
    return tl.load(unit_ptr), tl.load(unit_ptr + 4), tl.load(unit_ptr + 5)


@triton.jit
def _first_word(offset, PER_WORD: tl.constexpr):
    """Of an entry that begins with the arena's element ``offset``, so that its alignment is known:
    the compiler keeps no hint beyond a quotient, or from a loop's last turn.
    """
    return offset // 32 * (32 // PER_WORD)
