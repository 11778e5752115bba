"""Sequences that wait in line: in order of arrival, but for those that are sent back to its end."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heapreplace

from engine.sequence import Place, Sequence, SequenceId
from ipc.messages import AdapterId


class WaitingQueue:
    """Holds waiting sequences; a sequence that comes back stands where it stood before.

    Kept by adapter, so that those whose adapter is away cost nothing to step over.
    """

    def __init__(self) -> None:
        self._queues: dict[AdapterId | None, list[Sequence]] = {}
        self._num_sequences = 0
        self._adapters: tuple[AdapterId, ...] | None = ()
        self._last_place: Place = (SequenceId(0), 0)

    def __len__(self) -> int:
        return self._num_sequences

    def add(self, sequence: Sequence) -> None:
        queue = self._queues.setdefault(sequence.adapter_id, [])
        insort(queue, sequence, key=_place)
        self._num_sequences += 1
        self._last_place = max(self._last_place, sequence.place)
        if queue[0] is sequence:
            self._adapters = None

    def add_last(self, sequence: Sequence) -> None:
        """The sequence waits behind all that have come so far, and before all that will."""
        newest, count = self._last_place
        sequence.place = (newest, count + 1)
        self.add(sequence)

    def send_back(self, adapter_id: AdapterId, behind: Place) -> None:
        """Those of the adapter's that stand before ``behind`` go to the end of the line."""
        for sequence in tuple(self.waiting_for(adapter_id)):
            if sequence.place < behind:
                self.remove(sequence)
                self.add_last(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes out one that is waiting."""
        queue = self._queues[sequence.adapter_id]
        index = bisect_left(queue, sequence.place, key=_place)
        assert queue[index] is sequence, "only a waiting sequence is taken out"
        del queue[index]
        self._num_sequences -= 1
        if not queue:
            del self._queues[sequence.adapter_id]
        if index == 0:
            self._adapters = None

    def remove_all(self, adapter_id: AdapterId) -> list[Sequence]:
        """Takes out all that wait with this adapter, in the order of the line."""
        queue = self._queues.pop(adapter_id, [])
        self._num_sequences -= len(queue)
        self._adapters = None
        return queue

    def adapters(self) -> tuple[AdapterId, ...]:
        """The adapters that are waited for, in the order of each one's first sequence.

        The same object as long as that order is the same.
        """
        if self._adapters is None:
            heads = sorted(
                (queue[0].place, adapter_id)
                for adapter_id, queue in self._queues.items()
                if adapter_id is not None
            )
            self._adapters = tuple(adapter_id for _, adapter_id in heads)
        return self._adapters

    def first(self, adapter_id: AdapterId) -> Sequence:
        """The first in line that waits with this adapter. Raises ``KeyError``."""
        return self._queues[adapter_id][0]

    def waiting_for(self, adapter_id: AdapterId) -> list[Sequence]:
        """All that wait with this adapter, in the order of the line; not to be changed."""
        return self._queues.get(adapter_id, [])

    def num_waiting(self, adapter_id: AdapterId) -> int:
        return len(self._queues.get(adapter_id, ()))

    def admissible(self, is_admissible: Callable[[Sequence], bool]) -> Iterator[Sequence]:
        """Yields sequences in the order of the line; each is to be taken out before the next.

        ``is_admissible`` is asked of the first of each adapter and again of every next one; once
        it says no, no later sequence of that adapter comes up.
        """
        heads = [
            (queue[0].place, queue) for queue in self._queues.values() if is_admissible(queue[0])
        ]
        heapify(heads)
        while heads:
            queue = heads[0][1]
            yield queue[0]
            if queue and is_admissible(queue[0]):
                heapreplace(heads, (queue[0].place, queue))
            else:
                heappop(heads)


def _place(sequence: Sequence) -> Place:
    return sequence.place
