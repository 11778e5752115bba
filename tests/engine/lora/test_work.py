"""The lists of work: everything that has to be done is in them once."""

import random
from collections import Counter

from engine.lora.work import (
    EXPAND_WORD,
    SHRINK_ROW_WORD,
    SHRINK_ROWS_WORD,
    UNIT_WORDS,
    RowSegment,
    UnitShape,
    flag_rows,
    list_row_tiles,
    list_units,
    num_flag_rows,
)

SHAPE = UnitShape(
    max_rows=16,
    row_ranks=16,
    rows_ranks=32,
    ranks=(16, 64, 256),
    columns=(512, 128, 32, 256, 128, 64),
)
KINDS = (SHRINK_ROW_WORD, SHRINK_ROWS_WORD, EXPAND_WORD)


def listed(segments: list[RowSegment]) -> tuple[list[list[int]], ...]:
    """Units that shrink one row, that shrink several, and that expand."""
    table = list_units(segments, SHAPE)
    counts = table[0, :3].tolist()
    assert table.shape == (1 + max(counts), UNIT_WORDS)
    units = []
    for count, word in zip(counts, KINDS, strict=True):
        units.append(table[1 : 1 + count, word : word + 6].tolist())
        assert not table[1 + count :, word : word + 8].any()
    return tuple(units)


def test_units_of_one_row() -> None:
    row, rows, expand = listed([RowSegment(index=5, max_rank=40, start=7, stop=8)])
    assert row == [[5, 7, 1, 0, 0, 1], [5, 7, 1, 0, 1, 1], [5, 7, 1, 0, 2, 1]]
    assert rows == []
    assert expand == [[5, 7, 1, 0, unit, 1] for unit in range(4)]


def test_units_of_several_rows() -> None:
    row, rows, expand = listed([RowSegment(index=5, max_rank=40, start=7, stop=24)])
    assert row == []
    assert [unit[:3] + unit[4:] for unit in rows] == [
        [5, 7, 16, 0, 4],
        [5, 7, 16, 1, 4],
        [5, 23, 1, 0, 4],
        [5, 23, 1, 1, 4],
    ]
    assert [unit[:3] + unit[4:] for unit in expand] == [
        [5, start, count, unit, 4] for start, count in ((7, 16), (23, 1)) for unit in range(4)
    ]


def test_no_segments_make_no_units() -> None:
    assert listed([]) == ([], [], [])


def test_every_rank_and_column_of_every_row_is_in_one_unit(rng: random.Random) -> None:
    segments = []
    start = 3
    for index in range(rng.randint(1, 60)):
        stop = start + rng.choice([1, 1, 2, rng.randint(1, 40)])
        segments.append(RowSegment(index, 8 * rng.randint(1, 32), start, stop))
        start = stop + rng.randint(0, 2)
    num_rows = sum(segment.num_rows for segment in segments)
    kinds = listed(segments)
    assert all(len(units) <= SHAPE.max_units(num_rows) for units in kinds)
    num_alone = 0
    for segment in segments:
        is_alone = segment.num_rows == 1
        covered = [
            Counter(
                (row, unit)
                for index, first_row, count, _, unit, _ in units
                if index == segment.index
                for row in range(first_row, first_row + count)
            )
            for units in kinds
        ]
        rows = range(segment.start, segment.stop)
        shrink_units = -(-segment.max_rank // (16 if is_alone else 32))
        every_shrink = {(row, unit): 1 for row in rows for unit in range(shrink_units)}
        assert covered[0] == (every_shrink if is_alone else {})
        assert covered[1] == ({} if is_alone else every_shrink)
        variant = next(unit[5] for unit in kinds[2] if unit[0] == segment.index)
        assert SHAPE.ranks[variant % 3] >= segment.max_rank and (variant < 3) == is_alone
        expand_units = range(512 // SHAPE.columns[variant])
        assert covered[2] == {(row, unit): 1 for row in rows for unit in expand_units}
        if is_alone:
            of_segment = [unit for unit in kinds[0] + kinds[2] if unit[0] == segment.index]
            assert {unit[3] for unit in of_segment} == {num_alone}
            num_alone += 1


def test_rows_in_a_segment_are_flagged_and_no_others() -> None:
    segments = [RowSegment(1, 8, 2, 3), RowSegment(4, 8, 20, 26)]
    flags = flag_rows(segments, 30)
    assert flags.shape == (num_flag_rows(30), UNIT_WORDS) == (2, 24)
    assert flags.reshape(-1).nonzero()[0].tolist() == [2, 20, 21, 22, 23, 24, 25]
    assert flag_rows([], 24).shape == (1, 24) and not flag_rows([], 24).any()


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
