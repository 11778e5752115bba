"""The lists of work: everything that has to be done is in them once."""

import random
from collections import Counter

import numpy as np

from engine.lora.work import (
    EXPAND_WORD,
    UNIT_WORDS,
    RowSegment,
    UnitShape,
    list_row_tiles,
    list_units,
)

SHAPE = UnitShape(tile_ranks=16, ranks=(16, 64, 256), columns=(512, 256, 64))


def listed(segments: list[RowSegment]) -> tuple[list[list[int]], list[list[int]]]:
    """Shrink and expand units."""
    out = np.full((1 + SHAPE.max_units(len(segments)), UNIT_WORDS), -7, np.int32)
    used = list_units(segments, SHAPE, out)
    num_shrink, num_expand = out[0, :2].tolist()
    assert used == 1 + max(num_shrink, num_expand)
    assert (out[used:] == -7).all()
    shrink = out[1 : 1 + num_shrink, :5].tolist()
    expand = out[1 : 1 + num_expand, EXPAND_WORD : EXPAND_WORD + 6].tolist()
    return shrink, expand


def test_units_of_one_segment() -> None:
    shrink, expand = listed([RowSegment(index=5, max_rank=40, start=7, stop=10)])
    assert shrink == [[5, 7, 3, 0, 0], [5, 7, 3, 0, 1], [5, 7, 3, 0, 2]]
    assert expand == [[5, 7, 3, 0, 0, 1], [5, 7, 3, 0, 1, 1]]


def test_no_segments_make_no_units() -> None:
    assert listed([]) == ([], [])


def test_every_rank_and_column_of_every_segment_is_in_one_unit(rng: random.Random) -> None:
    segments = []
    start = 3
    for index in range(rng.randint(1, 60)):
        stop = start + rng.randint(1, 9)
        segments.append(RowSegment(index, 8 * rng.randint(1, 32), start, stop))
        start = stop + rng.randint(0, 2)
    shrink, expand = listed(segments)
    scratch_row = 0
    for segment in segments:
        words = [segment.index, segment.start, segment.num_rows, scratch_row]
        scratch_row += segment.num_rows
        tiles = [unit[4] for unit in shrink if unit[:4] == words]
        assert tiles == list(range(len(tiles)))
        assert len(tiles) * SHAPE.tile_ranks >= segment.max_rank
        units = [unit[4:] for unit in expand if unit[:4] == words]
        variant = units[0][1]
        assert units == [[unit, variant] for unit in range(512 // SHAPE.columns[variant])]
        assert SHAPE.ranks[variant] >= segment.max_rank
    assert Counter(unit[0] for unit in shrink).keys() == {each.index for each in segments}


def test_tiles_cover_each_row_of_large_segments_once(rng: random.Random) -> None:
    segments = [RowSegment(1, 8, 0, 128), RowSegment(4, 8, 130, 259), RowSegment(2, 8, 259, 260)]
    tiles = list_row_tiles(segments, 128)
    assert tiles.tolist() == [
        [1, 0, 128, 0],
        [4, 130, 128, 0],
        [4, 258, 1, 0],
        [2, 259, 1, 0],
    ]
    assert list_row_tiles([], 128).shape == (0, 4)
