"""When the adapters that are being loaded will be there, by bytes over bandwidth."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ipc.messages import AdapterId

# The weight of the newest load.
_NEWEST = 0.3


class Arrival(NamedTuple):
    """An adapter's last byte is expected in its slot at ``expected_s``."""

    adapter_id: AdapterId
    expected_s: float


class LoadForecast:
    """The bandwidth of past loads, which came one after the other over one bus."""

    def __init__(self) -> None:
        self._bytes_per_s: float | None = None
        self._last_placed_s = 0.0

    def placed(self, num_bytes: int, began_s: float, placed_s: float) -> None:
        """A load that began at ``began_s`` is in its slot."""
        seconds = placed_s - max(began_s, self._last_placed_s)
        self._last_placed_s = placed_s
        if seconds <= 0.0:
            return
        rate = num_bytes / seconds
        before = rate if self._bytes_per_s is None else self._bytes_per_s
        self._bytes_per_s = before + _NEWEST * (rate - before)

    def arrivals(
        self, loads: Iterable[tuple[AdapterId, int, float]], now_s: float
    ) -> Iterator[Arrival]:
        """The adapters of ``loads`` (id, bytes, when it began), which come in this order.

        Nothing before the first load of all has been seen: it may be as slow as it likes. What
        should have been there by now is expected at once.
        """
        if self._bytes_per_s is None:
            return
        free_s = self._last_placed_s
        for adapter_id, num_bytes, began_s in loads:
            free_s = max(free_s, began_s) + num_bytes / self._bytes_per_s
            yield Arrival(adapter_id, max(free_s, now_s))
