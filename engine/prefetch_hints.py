"""Adapters that somebody said are likely to be asked for.

A hint makes the loader bring the adapter into its host tier, behind everything that waiting
requests need, and the engine load it into the pool where that takes nothing from anybody. It is
forgotten when the adapter

- is asked for: from then on it is in demand,
- is resident: the hint has come true,
- can not be loaded, or is unregistered,
- is the oldest hint when there are too many.
"""

from collections.abc import Iterable

from ipc.messages import MAX_PREFETCH_HINTS, AdapterId


class PrefetchHints:
    """At most ``MAX_PREFETCH_HINTS`` adapters, in order of their latest hint."""

    def __init__(self) -> None:
        self._adapters: dict[AdapterId, None] = {}
        self._version = 0

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._version

    def adapters(self) -> list[AdapterId]:
        """The oldest hint first."""
        return list(self._adapters)

    def add(self, adapter_ids: Iterable[AdapterId]) -> None:
        """Each is the newest hint in its turn; the oldest ones beyond the bound go."""
        for adapter_id in adapter_ids:
            self._adapters.pop(adapter_id, None)
            self._adapters[adapter_id] = None
        for adapter_id in list(self._adapters)[:-MAX_PREFETCH_HINTS]:
            del self._adapters[adapter_id]
        self._version += 1

    def forget(self, adapter_id: AdapterId) -> None:
        """Nothing happens if it is not hinted at."""
        if adapter_id in self._adapters:
            del self._adapters[adapter_id]
            self._version += 1
