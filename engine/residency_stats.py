"""What residency counts."""

from engine.histogram import LOAD_SECONDS, Histogram
from ipc.stats import LoadStats


class ResidencyStats:
    """Loads and evictions since the start; their meaning is that of ``LoadStats``."""

    def __init__(self) -> None:
        self.load_seconds = Histogram(LOAD_SECONDS)
        self._place_seconds = Histogram(LOAD_SECONDS)
        self.loaded_bytes = 0
        self.num_failed = 0
        self.num_cancelled = 0
        self.num_lost = 0
        self.num_evictions = 0

    def placed(self, num_bytes: int, load_s: float, place_s: float) -> None:
        """A load is complete."""
        self.load_seconds.observe(load_s)
        self._place_seconds.observe(place_s)
        self.loaded_bytes += num_bytes

    def counts(self) -> LoadStats:
        """All so far."""
        return LoadStats(
            load_seconds=self.load_seconds.counts(),
            place_seconds=self._place_seconds.counts(),
            loaded_bytes=self.loaded_bytes,
            num_failed=self.num_failed,
            num_cancelled=self.num_cancelled,
            num_lost=self.num_lost,
            num_evictions=self.num_evictions,
        )
