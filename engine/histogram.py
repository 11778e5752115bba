"""Counts observations by size."""

from bisect import bisect_left

from ipc.stats import HistogramCounts

LOAD_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""From a small adapter's copy to a large one's way from a slow disk."""
STEP_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06,
    0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0,
)  # fmt: skip
"""From a decode of a small model on a GPU to one on a CPU."""


class Histogram:
    """Observations up to each of ``bounds``, which rise, and above the last. Of one thread."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one; allocates nothing."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def num_observations(self) -> int:
        return sum(self._counts)

    @property
    def sum(self) -> float:
        return self._sum

    def counts(self) -> HistogramCounts:
        """All so far."""
        return HistogramCounts(self._bounds, tuple(self._counts), self._sum)
