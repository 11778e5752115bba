"""Measurements as tables."""

from io import StringIO

import pytest
from rich.console import Console

from tests.tools.bench.records import bystander, measurement, planned, run_of
from tools.bench.records import Measurement, Results
from tools.bench.report import print_results
from tools.bench.summary import Limits


def printed(results: Results, limits: Limits | None = None) -> list[str]:
    console = Console(file=StringIO(), width=120)
    print_results(results, limits or Limits(), console)
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def row(lines: list[str], group: str, name: str) -> list[str]:
    """The cells of the row ``name`` below ``group``."""
    begin = next(place for place, line in enumerate(lines) if line.startswith(group))
    found = next(line for line in lines[begin:] if line[len(group) :].strip().startswith(name))
    return found[found.index(name) + len(name) :].split()


def slow_and_fast() -> list[Measurement]:
    fast = run_of(planned(0, 0.0, [100.0, 110.0]), bystander(0, 0.5, [10.0, 20.0, 30.0]),
                  counters={"sidestream:adapter_loads_total": 3.0, "x_total": 9.0})  # fmt: skip
    slow = run_of(planned(0, 0.0, [250.0, 280.0]), planned(1, 0.0, [], failure="status 503"))
    return [measurement("fast", fast), measurement("slow", slow)]


def test_one_measurement_is_shown_with_all_its_statistics() -> None:
    lines = printed(Results(measurements=slow_and_fast()[:1]))
    assert lines[0] == (
        "fast 2 requests, 4/s Poisson, for 2 adapters (round-robin), 8 tokens in, 3 out, seed 0"
    )
    assert row(lines, "requests", "TTFT") == ["100"] * 5 + ["1"]
    assert row(lines, "bystanders", "ITL") == ["10"] * 5 + ["2"]
    assert "requests: 1 of 1 completed, 0.2 tokens/s, 0.10 requests/s" in lines
    assert "server: sidestream:adapter_loads_total 3" in lines


def test_several_measurements_stand_side_by_side_with_their_ratio_to_the_first() -> None:
    lines = printed(Results(measurements=slow_and_fast()))
    assert row(lines, "requests", "TTFT p50, ms") == ["100", "250", "(×2.50)"]
    assert row(lines, "requests", "ITL max, ms") == ["10", "30", "(×3.00)"]
    assert row(lines, "requests", "failed") == ["0", "1"]
    assert row(lines, "bystanders", "ITL p99, ms") == ["10", "–"]
    assert row(lines, "server", "sidestream:adapter_loads_total") == ["3", "–"]
    # A slow generator is no slow server.
    assert row(lines, "generator", "loop lag p99, ms") == ["0.1", "0.1"]
    assert not [line for line in lines if "x_total" in line]


def test_failures_and_warnings_stand_below_the_table() -> None:
    late = measurement("late", run_of(planned(0, 9.0, [1.0], due_s=0.0)))
    results = Results(
        measurements=[*slow_and_fast(), late],
        failures={"dead": "the server ended with status 1 before it was ready"},
    )
    lines = printed(results)
    assert lines[-3] == "slow: 1 × status 503 (requests)"
    assert lines[-2].startswith("late: the generator itself was late: send lag p99 9000.0 ms")
    assert lines[-1] == "dead: the server ended with status 1 before it was ready"


def test_goodput_is_shown_where_there_is_a_limit() -> None:
    lines = printed(Results(measurements=slow_and_fast()), Limits(ttft_s=0.2))
    assert row(lines, "requests", "goodput, 1/s") == ["0.1", "0", "(×0.00)"]
    lines = printed(Results(measurements=slow_and_fast()[:1]), Limits(ttft_s=0.2))
    assert any(line.endswith("0.10 good ones") for line in lines)


def test_bystanders_that_the_end_stopped_are_no_failures() -> None:
    run = run_of(planned(0, 0.0, [1.0]), bystander(0, 0.0, [5.0, 6.0], was_stopped=True))
    lines = printed(Results(measurements=[measurement("one", run)]))
    assert any(
        line.startswith("bystanders: 0 of 1 completed (1 stopped with the") for line in lines
    )


@pytest.mark.parametrize(
    ("ttft_ms", "shown"),
    [(0.5, "0.5"), (12.345, "12.3"), (123.456, "123"), (9876.5, "9876"), (7.0, "7")],
)
def test_numbers_are_shown_with_the_digits_that_count(ttft_ms: float, shown: str) -> None:
    lines = printed(Results(measurements=[measurement("one", run_of(planned(0, 0.0, [ttft_ms])))]))
    assert row(lines, "requests", "TTFT")[0] == shown
