"""What the kernels are told of a step's adapters: lists of pieces of work, as data.

A launch's grid is fixed; its programs share out the list that they find in device memory. So a
CUDA graph replays for any adapters, and rows of the base cost nothing: they are in no list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]

# Words of a row of the list of small segments' work: a shrink unit, then an expand unit.
UNIT_WORDS = 16
EXPAND_WORD = 8


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

    A shrink unit covers ``tile_ranks`` ranks. An expand unit covers all ranks of ``columns[v]`` of
    every ``columns[0]`` columns, where ``ranks[v]`` is the first not below the adapter's: units
    read about as many bytes whatever the rank.
    """

    tile_ranks: int
    ranks: tuple[int, ...]
    columns: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.ranks) == len(self.columns) and list(self.ranks) == sorted(self.ranks)
        assert all(self.columns[0] % columns == 0 for columns in self.columns), self.columns

    def max_units(self, num_segments: int) -> int:
        """Rows of the list that so many segments of any rank can take."""
        shrink = -(-self.ranks[-1] // self.tile_ranks)
        expand = max(self.columns[0] // columns for columns in self.columns)
        return num_segments * max(shrink, expand)


def list_units(segments: Sequence[RowSegment], shape: UnitShape, out: IntArray) -> int:
    """Writes the list for small segments into ``out``; returns how many of its rows are used.

    ``out`` is ``[1 + max_units, UNIT_WORDS]``. Row 0 holds the numbers of shrink and of expand
    units. Each other row holds a shrink unit in its first words, an expand unit from
    ``EXPAND_WORD`` on, as far as there are any:

    | word | holds                                                            |
    |------|------------------------------------------------------------------|
    | 0    | the adapter's index                                              |
    | 1, 2 | the segment's first row in the step, and its number of rows      |
    | 3    | the segment's first row among those of all small segments        |
    | 4    | which of the segment's units it is                               |
    | 5    | expand units: the entry of ``shape.ranks`` that the rank is under |
    """
    table = np.array(
        [(each.index, each.start, each.num_rows, each.max_rank) for each in segments],
        dtype=np.int32,
    ).reshape(-1, 4)
    max_ranks = table[:, 3].copy()
    table[:, 3] = np.cumsum(table[:, 2]) - table[:, 2]
    variants = np.searchsorted(shape.ranks, max_ranks)
    assert not len(segments) or variants.max() < len(shape.ranks), max_ranks
    num_shrink = -(-max_ranks // shape.tile_ranks)
    num_expand = shape.columns[0] // np.array(shape.columns)[variants] * (max_ranks > 0)
    for counts, first_word in ((num_shrink, 0), (num_expand, EXPAND_WORD)):
        total = int(counts.sum())
        out[0, first_word // EXPAND_WORD] = total
        of_segment = np.repeat(np.arange(len(segments)), counts)
        units = out[1 : 1 + total, first_word : first_word + 6]
        units[:, :4] = table[of_segment]
        units[:, 4] = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        units[:, 5] = variants[of_segment]
    return 1 + int(out[0, :2].max())


def list_row_tiles(segments: Sequence[RowSegment], tile_rows: int) -> IntArray:
    """``[num_tiles, 4]``: index, first row and number of rows of each tile of large segments."""
    tiles = [
        (each.index, start, min(tile_rows, each.stop - start), 0)
        for each in segments
        for start in range(each.start, each.stop, tile_rows)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 4)
