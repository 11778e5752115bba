"""Quantiles of the last minute, by the second."""

import random

import pytest

from api.latencies import NUM_SECONDS, RecentLatencies


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_quantiles_are_those_of_the_second_to_within_three_percent() -> None:
    clock, draw = Clock(), random.Random(3)
    latencies = RecentLatencies(clock)
    seconds = sorted(draw.lognormvariate(-4, 1) for _ in range(1000))
    for value in draw.sample(seconds, len(seconds)):
        latencies.observe(value)
    series = latencies.series()
    assert series.num_observed[-1] == 1000
    assert series.p50_s[-1] == pytest.approx(seconds[499], rel=0.03)
    assert series.p99_s[-1] == pytest.approx(seconds[989], rel=0.03)


def test_each_second_stands_for_itself_and_a_minute_is_kept() -> None:
    clock = Clock()
    latencies = RecentLatencies(clock)
    latencies.observe(1.0)
    clock.now_s = 103.5
    latencies.observe(0.0)
    series = latencies.series()
    assert series.num_observed[-4:] == [1, 0, 0, 1]
    assert series.p50_s[-3:-1] == [None, None]
    assert series.p50_s[-4] == pytest.approx(1.0, rel=0.03)
    clock.now_s = 100.0 + NUM_SECONDS
    assert sum(latencies.series().num_observed) == 1
    clock.now_s = 10_000.0
    assert latencies.series().num_observed == [0] * NUM_SECONDS


def test_the_minutes_quantiles_are_of_all_latencies_and_not_of_the_seconds_quantiles() -> None:
    clock = Clock()
    latencies = RecentLatencies(clock)
    assert latencies.series().minute_p99_s is None
    # One slow second of five tokens among many fast ones of a hundred each.
    for second in range(NUM_SECONDS - 1):
        clock.now_s = 100.0 + second
        for _ in range(5 if second == 7 else 100):
            latencies.observe(1.0 if second == 7 else 0.01)
    series = latencies.series()
    assert series.minute_p50_s == pytest.approx(0.01, rel=0.03)
    assert series.minute_p99_s == pytest.approx(0.01, rel=0.03)
    for _ in range(100):
        latencies.observe(1.0)
    assert latencies.series().minute_p99_s == pytest.approx(1.0, rel=0.03)
