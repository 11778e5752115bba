"""What is made of the times of a decode step and of its bounds."""

from dataclasses import astuple

import pytest

from tools.adapter_reads.figures import Floor, Row, StepTimes, make_row, table

TIMES = StepTimes(base_ms=5.0, adapters_ms=6.25, two_reads_ms=6.0, one_read_ms=5.8)
FLOOR = Floor(bytes_ms=0.5, two_nodes_ms=0.2, one_node_ms=0.1)


def row_of(case: str, times: StepTimes = TIMES) -> Row:
    return make_row("forked", case, 1e-3, times, FLOOR)


def test_added_time_is_over_the_base_step_and_as_many_nodes_as_there_are_launches() -> None:
    row = row_of("a")
    assert astuple(row.adapters) == pytest.approx((1.25, 2.5, 2.1, 0.2))
    assert astuple(row.two_reads) == pytest.approx((1.0, 2.0, 1.6, 1 / 6))
    assert astuple(row.one_read) == pytest.approx((0.8, 1.6, 1.4, 0.8 / 5.8))


def test_parts_are_the_steps_between_the_bounds_and_add_up_to_the_added_time() -> None:
    row = row_of("a")
    assert astuple(row.parts) == pytest.approx((0.5, 0.3, 0.2, 0.25))
    assert sum(astuple(row.parts)) == pytest.approx(row.adapters.added_ms)


def test_added_time_is_compared_with_both_bounds() -> None:
    row = row_of("a")
    assert (row.over_two_reads, row.over_one_read) == pytest.approx((1.25, 1.5625))


def test_table_has_a_line_for_each_row_by_case_below_its_columns() -> None:
    slower = StepTimes(base_ms=5.0, adapters_ms=10.0, two_reads_ms=9.0, one_read_ms=8.0)
    lines = table([row_of("32 x rank 16, batch 32"), row_of("1 x rank 256", slower)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    above, header, first, second = (line.split() for line in lines)
    assert above[-2:] == ["over", "reading"] and header[:4] == ["base", "all", "ms", "share"]
    assert first[:3] == ["1", "x", "rank"] and second[:2] == ["32", "x"]
    assert first[4:11] == ["forked", "5.000", "10.000", "5.000", "50.0%", "0.500", "2.500"]
    assert second[6:] == [
        *("forked", "5.000", "6.250", "1.250", "20.0%", "0.500", "0.300", "0.200", "0.250"),
        *("2.50", "(2.10)", "2.00", "(1.60)", "1.60", "(1.40)", "1.25", "1.56"),
    ]
