"""Figures of traces made by hand, in exact numbers."""

import pytest

from tests.tools.timeline.traces import copy, one_load, one_load_with_groups, stage, step
from tools.timeline.figures import Window, busiest, figures_of, whole
from tools.trace_file import Trace


def test_figures_of_the_whole_trace() -> None:
    trace = one_load()
    figures = figures_of(trace, whole(trace))
    assert figures.busy_share == pytest.approx(54 / 60)
    assert figures.num_steps == 3
    assert figures.longest_gap_ms == pytest.approx(4)
    assert (figures.num_loads, figures.load_bytes) == (1, 100)
    assert figures.read_ms == pytest.approx(10)
    assert figures.stage_ms == pytest.approx(8)
    assert figures.copy_ms == pytest.approx(10)
    assert figures.wait_ms == pytest.approx(12)
    # Of [8, 30) ms only the gap of [10, 14) has no step beside it.
    assert figures.beside_share == pytest.approx(18 / 22)


def test_figures_of_prefills_that_overlap_their_own_load() -> None:
    trace = one_load_with_groups()
    figures = figures_of(trace, whole(trace))
    assert (figures.num_steps, figures.num_groups, figures.num_early_groups) == (3, 2, 1)
    # From its first group at 4 ms on, of 10 ms.
    assert figures.own_prefill_share == pytest.approx(0.6)
    assert figures_of(one_load(), whole(one_load())).own_prefill_share == 0.0


def test_figures_of_a_window_count_what_lies_within() -> None:
    figures = figures_of(one_load(), Window(0.012, 0.022))
    assert figures.busy_share == pytest.approx(8 / 10)
    assert (figures.num_steps, figures.longest_gap_ms) == (1, None)
    assert figures.beside_share == pytest.approx(8 / 10)


def test_a_window_without_loads_has_no_load_times() -> None:
    figures = figures_of(one_load(), Window(0.045, 0.055))
    assert (figures.num_loads, figures.load_bytes) == (0, 0)
    assert figures.read_ms is figures.stage_ms is figures.copy_ms is figures.wait_ms is None
    assert figures.beside_share is figures.own_prefill_share is None
    assert figures.busy_share == pytest.approx(1)


def test_a_load_that_is_used_at_once_did_not_wait() -> None:
    spans = (stage("a", 1, 1, 0, 0, 1), copy("a", 1, 0, 1, 5), step(3, 9, "prefill", "a"))
    trace = Trace(spans, 0)
    assert figures_of(trace, whole(trace)).wait_ms == 0


def test_a_short_trace_is_shown_whole() -> None:
    assert busiest(one_load()) == Window(0.0, 0.060)


def test_a_long_trace_is_shown_where_most_bytes_came_in() -> None:
    lonely = (stage("a", 1, 1, 0, 200, 201), copy("a", 1, 0, 201, 202))
    dense = tuple(
        span
        for n in range(4)
        for span in (
            stage("b", 2, 2 + n, 0, 3000 + 50 * n, 3001 + 50 * n),
            copy("b", 2 + n, 0, 3001 + 50 * n, 3002 + 50 * n),
        )
    )
    trace = Trace((step(0, 10), *lonely, *dense, step(5000, 5010)), 0)
    window = busiest(trace)
    assert window.begin_s == pytest.approx(2.95)
    assert window.duration_s == pytest.approx(0.5)


def test_the_shown_stretch_stays_within_the_trace() -> None:
    late = (stage("a", 1, 1, 0, 4990, 4991), copy("a", 1, 0, 4991, 4992))
    window = busiest(Trace((step(0, 10), *late, step(4995, 5000)), 0))
    assert [window.begin_s, window.end_s] == pytest.approx([4.5, 5.0])


def test_without_loads_the_begin_of_a_long_trace_is_shown() -> None:
    assert busiest(Trace((step(0, 10), step(4000, 4010)), 0)) == Window(0.0, 0.5)


def test_a_read_counts_as_load_time_also_where_its_load_lies_outside_the_window() -> None:
    figures = figures_of(one_load(), Window(0.008, 0.016))
    assert figures.num_loads == 0
    # Read in all of [8, 16) ms, steps in [8, 10) and [14, 16).
    assert figures.beside_share == pytest.approx(0.5)
