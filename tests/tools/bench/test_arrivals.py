"""When requests arrive."""

import random
import statistics
from itertools import pairwise

import pytest

from tools.bench.arrivals import arrival_times


@pytest.mark.parametrize(("rate", "variation"), [(4.0, 1.0), (2.0, 0.5), (10.0, 4.0), (2.0, 8.0)])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(
    rate: float, variation: float
) -> None:
    times = arrival_times(200_000, rate, variation, random.Random(5))
    gaps = [after - before for before, after in pairwise([0.0, *times])]
    assert all(gap >= 0 for gap in gaps)
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / rate, rel=0.05)
    assert statistics.pstdev(gaps) / mean == pytest.approx(variation, rel=0.05)


def test_poisson_arrivals_come_as_often_in_any_second_as_its_law_says() -> None:
    times = arrival_times(40_000, 4.0, 1.0, random.Random(6))
    counts = [0] * (int(times[-1]) + 1)
    for at_s in times:
        counts[int(at_s)] += 1
    # A Poisson law's variance is its mean.
    assert statistics.fmean(counts) == pytest.approx(4.0, rel=0.03)
    assert statistics.pvariance(counts) == pytest.approx(4.0, rel=0.05)


def test_without_variation_arrivals_are_evenly_spaced() -> None:
    assert arrival_times(4, 2.0, 0.0, random.Random(1)) == [0.5, 1.0, 1.5, 2.0]


def test_without_a_rate_everything_arrives_at_once() -> None:
    assert arrival_times(3, None, 1.0, random.Random(1)) == [0.0, 0.0, 0.0]
