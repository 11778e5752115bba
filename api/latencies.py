"""How long tokens took in each second of the last minute, for a plot."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

NUM_SECONDS = 60

# Latencies are counted in classes, each wider than the one before by this factor: what is read of
# them is right to within half of that.
_RATIO = 1.06
_LOG_RATIO = math.log(_RATIO)
_SHORTEST_S = 1e-5


class LatencySeries(msgspec.Struct, frozen=True):
    """One entry a second, the oldest first; the last one is the second that goes on.

    ``p50_s`` and ``p99_s`` are in seconds, null where nothing was observed. ``minute_p50_s`` and
    ``minute_p99_s`` are of all that was observed in these seconds.
    """

    num_observed: list[int]
    p50_s: list[float | None]
    p99_s: list[float | None]
    minute_p50_s: float | None
    minute_p99_s: float | None


class RecentLatencies:
    """Counts latencies by the second in which they were observed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: list[dict[int, int]] = [{} for _ in range(NUM_SECONDS)]
        self._newest = int(clock())

    def observe(self, seconds: float) -> None:
        counts = self._seconds[self._advance() % NUM_SECONDS]
        latency_class = int(math.log(max(seconds, _SHORTEST_S) / _SHORTEST_S) / _LOG_RATIO)
        counts[latency_class] = counts.get(latency_class, 0) + 1

    def series(self) -> LatencySeries:
        """The last minute."""
        first = self._advance() + 1
        seconds = [self._seconds[(first + place) % NUM_SECONDS] for place in range(NUM_SECONDS)]
        minute: Counter[int] = Counter()
        for counts in seconds:
            minute.update(counts)
        return LatencySeries(
            [sum(counts.values()) for counts in seconds],
            [_quantile(counts, 0.5) for counts in seconds],
            [_quantile(counts, 0.99) for counts in seconds],
            _quantile(minute, 0.5),
            _quantile(minute, 0.99),
        )

    def _advance(self) -> int:
        now = int(self._clock())
        if now > self._newest:
            for second in range(max(self._newest + 1, now - NUM_SECONDS + 1), now + 1):
                self._seconds[second % NUM_SECONDS] = {}
            self._newest = now
        return self._newest


def _quantile(counts: Mapping[int, int], share: float) -> float | None:
    """The middle of the class in which the nearest-rank quantile lies."""
    rank = math.ceil(share * sum(counts.values()))
    for latency_class in sorted(counts):
        rank -= counts[latency_class]
        if rank <= 0:
            return float(_SHORTEST_S * _RATIO ** (latency_class + 0.5))
    return None
