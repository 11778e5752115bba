"""What the kernels are told of a step's adapters: lists of pieces of work, as data.

A launch's grid is fixed; its programs share out the list that they find in device memory. So a
CUDA graph replays for any adapters, and rows of the base cost nothing: they are in no list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

# Words of a row of the list of small segments' work: a unit of each kind, one beside the other.
UNIT_WORDS = 24
SHRINK_ROW_WORD, SHRINK_ROWS_WORD, EXPAND_WORD = range(0, UNIT_WORDS, 8)


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Rows ``[start, stop)`` of a step belong to the adapter with this index in the table.

    ``max_rank`` is the largest padded rank that it has anywhere.
    """

    index: int
    max_rank: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class UnitShape:
    """How large a unit of work on a small segment is.

    A unit covers one row, where a segment has no more, or up to ``max_rows`` of them. A shrink unit
    covers ``row_ranks`` ranks of the one, ``rows_ranks`` of the others. An expand unit covers all
    ranks of ``columns[v]`` of every ``max_columns`` columns: ``v`` is the first with ``ranks[v]``
    not below the adapter's, and as many further on where there are several rows.
    """

    max_rows: int
    row_ranks: int
    rows_ranks: int
    ranks: tuple[int, ...]
    columns: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.columns) == 2 * len(self.ranks) and list(self.ranks) == sorted(self.ranks)
        assert all(self.max_columns % columns == 0 for columns in self.columns), self.columns

    @property
    def max_columns(self) -> int:
        return max(self.columns)

    def max_units(self, num_rows: int) -> int:
        """Rows of the list that so many rows of a step can take, in segments of any rank."""
        shrink = -(-self.ranks[-1] // min(self.row_ranks, self.rows_ranks))
        return num_rows * max(shrink, self.max_columns // min(self.columns))


def list_units(segments: Sequence[RowSegment], shape: UnitShape) -> IntArray:
    """The list for small segments, ``[1 + longest, UNIT_WORDS]``.

    Row 0 holds the numbers of units that shrink one row, that shrink several, and that expand. The
    other rows hold them, the kinds side by side from the words ``SHRINK_ROW_WORD``,
    ``SHRINK_ROWS_WORD`` and ``EXPAND_WORD`` on:

    | word | holds                                                                     |
    |------|---------------------------------------------------------------------------|
    | 0    | the adapter's index                                                       |
    | 1, 2 | the unit's first row in the step, and its number of rows                  |
    | 3    | of units that have one row: which of all these rows it is                 |
    | 4    | which of the units for these rows it is                                   |
    | 5    | expand units: the entry of ``shape.columns`` that they are as large as    |
    """
    tiles = np.array(
        [
            (each.index, row, min(shape.max_rows, each.stop - row), each.max_rank, each.num_rows)
            for each in segments
            for row in range(each.start, each.stop, shape.max_rows)
        ],
        dtype=np.int32,
    ).reshape(-1, 5)
    max_ranks, is_single = tiles[:, 3].copy(), tiles[:, 4] == 1
    tiles[:, 3] = np.cumsum(is_single) - 1
    variants = np.searchsorted(shape.ranks, max_ranks)
    assert not len(tiles) or variants.max() < len(shape.ranks), max_ranks
    variants += np.where(is_single, 0, len(shape.ranks))
    num_expand = shape.max_columns // np.array(shape.columns)[variants] * (max_ranks > 0)
    kinds = (
        (SHRINK_ROW_WORD, -(-max_ranks // shape.row_ranks) * is_single),
        (SHRINK_ROWS_WORD, -(-max_ranks // shape.rows_ranks) * ~is_single),
        (EXPAND_WORD, num_expand),
    )
    totals = [int(counts.sum()) for _, counts in kinds]
    out = np.zeros((1 + max(totals), UNIT_WORDS), np.int32)
    out[0, : len(totals)] = totals
    for (word, counts), total in zip(kinds, totals, strict=True):
        of_tile = np.repeat(np.arange(len(tiles)), counts)
        units = out[1 : 1 + total, word : word + 6]
        units[:, :4] = tiles[of_tile, :4]
        units[:, 4] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        units[:, 5] = variants[of_tile]
    return out


def flag_rows(segments: Sequence[RowSegment], num_rows: int) -> IntArray:
    """For each row of a step whether it is in a segment, 1 or 0; then zeros.

    ``[num_flag_rows(num_rows), UNIT_WORDS]``, so that it can stand ahead of a list of units.
    """
    flags = np.zeros((num_flag_rows(num_rows), UNIT_WORDS), np.int32)
    for each in segments:
        flags.reshape(-1)[each.start : each.stop] = 1
    return flags


def num_flag_rows(num_rows: int) -> int:
    """Rows of a list of units that the flags of so many rows of a step take."""
    return -(-num_rows // UNIT_WORDS)


def num_row_tiles(segments: Sequence[RowSegment], tile_rows: int) -> int:
    """How many tiles ``list_row_tiles`` lists."""
    return sum(-(-each.num_rows // tile_rows) for each in segments)


def list_row_tiles(segments: Sequence[RowSegment], tile_rows: int) -> IntArray:
    """``[num_tiles, 4]``: index, first row and number of rows of each tile of large segments.

    Tiles without rows, all zeros, may stand behind them.
    """
    tiles = [
        (each.index, start, min(tile_rows, each.stop - start), 0)
        for each in segments
        for start in range(each.start, each.stop, tile_rows)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 4)
