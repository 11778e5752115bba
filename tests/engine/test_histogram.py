from engine.histogram import Histogram
from ipc.stats import HistogramCounts


def test_an_observation_counts_for_the_least_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.5, 100.0):
        histogram.observe(value)
    assert histogram.counts() == HistogramCounts((1.0, 2.0), (2, 2, 2), 107.0)
    assert (histogram.num_observations, histogram.sum) == (6, 107.0)


def test_counts_that_were_taken_do_not_change() -> None:
    histogram = Histogram((1.0,))
    before = histogram.counts()
    histogram.observe(0.5)
    assert before == HistogramCounts((1.0,), (0, 0), 0.0)
