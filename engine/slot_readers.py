"""Whether a step in flight may still read an adapter's slot."""

from collections.abc import Iterable

from engine.adapter_slots import PooledAdapter


class SlotReaders:
    """Numbers the steps in the order of their launches, which is that of their ends."""

    def __init__(self) -> None:
        self._num_launched = 0
        self._num_completed = 0

    def launched(self, adapters: Iterable[PooledAdapter]) -> None:
        """A step is in flight, behind all before it, that reads these adapters' slots."""
        self._num_launched += 1
        for adapter in adapters:
            adapter.last_step = self._num_launched

    def completed(self) -> None:
        """The earliest step in flight reads nothing any more."""
        self._num_completed += 1
        assert self._num_completed <= self._num_launched, "a step is launched before it is complete"

    def is_in_flight(self, step: int) -> bool:
        """Whether the step of this number, which was launched, has not ended."""
        return step > self._num_completed
