"""Arrivals by bytes over bandwidth, one load after the other."""

import pytest

from engine.load_forecast import Arrival, LoadForecast
from ipc.messages import AdapterId

A, B = AdapterId(1), AdapterId(2)


def test_nothing_is_expected_before_a_load_was_seen() -> None:
    assert list(LoadForecast().arrivals([(A, 100, 0.0)], 1.0)) == []


def test_loads_come_one_after_the_other() -> None:
    forecast = LoadForecast()
    forecast.placed(1000, began_s=0.0, placed_s=1.0)
    loads = [(A, 500, 2.0), (B, 1000, 2.1)]
    assert list(forecast.arrivals(loads, 2.2)) == [Arrival(A, 2.5), Arrival(B, 3.5)]


def test_a_load_behind_another_is_not_blamed_for_its_wait() -> None:
    forecast = LoadForecast()
    forecast.placed(1000, began_s=0.0, placed_s=1.0)
    forecast.placed(1000, began_s=0.0, placed_s=2.0)
    assert list(forecast.arrivals([(A, 1000, 5.0)], 5.0)) == [Arrival(A, 6.0)]


def test_what_is_late_is_expected_at_once() -> None:
    forecast = LoadForecast()
    forecast.placed(1000, began_s=0.0, placed_s=1.0)
    assert list(forecast.arrivals([(A, 1000, 1.0)], 9.0)) == [Arrival(A, 9.0)]


def test_the_bandwidth_follows_the_loads() -> None:
    forecast = LoadForecast()
    forecast.placed(1000, began_s=0.0, placed_s=1.0)
    for number in range(30):
        forecast.placed(1000, began_s=number + 1.0, placed_s=number + 1.5)
    (arrival,) = forecast.arrivals([(A, 1000, 100.0)], 100.0)
    assert arrival.expected_s == pytest.approx(100.5, abs=0.01)
