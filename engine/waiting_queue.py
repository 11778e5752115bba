"""Sequences that wait, in order of arrival, as a whole and for each adapter."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heapreplace

from engine.sequence import Sequence, SequenceId
from ipc.messages import AdapterId


class WaitingQueue:
    """Holds waiting sequences; a sequence that comes back stands where its arrival puts it.

    Kept by adapter, so that those whose adapter is away cost nothing to step over.
    """

    def __init__(self) -> None:
        self._queues: dict[AdapterId | None, list[Sequence]] = {}
        self._num_sequences = 0
        self._adapters: tuple[AdapterId, ...] | None = ()

    def __len__(self) -> int:
        return self._num_sequences

    def add(self, sequence: Sequence) -> None:
        queue = self._queues.setdefault(sequence.adapter_id, [])
        insort(queue, sequence, key=_arrival)
        self._num_sequences += 1
        if queue[0] is sequence:
            self._adapters = None

    def remove(self, sequence: Sequence) -> None:
        """Takes out one that is waiting."""
        queue = self._queues[sequence.adapter_id]
        index = bisect_left(queue, sequence.sequence_id, key=_arrival)
        assert queue[index] is sequence, "only a waiting sequence is taken out"
        del queue[index]
        self._num_sequences -= 1
        if not queue:
            del self._queues[sequence.adapter_id]
        if index == 0:
            self._adapters = None

    def remove_all(self, adapter_id: AdapterId) -> list[Sequence]:
        """Takes out all that wait with this adapter, in order of arrival."""
        queue = self._queues.pop(adapter_id, [])
        self._num_sequences -= len(queue)
        self._adapters = None
        return queue

    def adapters(self) -> tuple[AdapterId, ...]:
        """The adapters that are waited for, in the order of each one's earliest sequence.

        The same object as long as that order is the same.
        """
        if self._adapters is None:
            heads = sorted(
                (queue[0].sequence_id, adapter_id)
                for adapter_id, queue in self._queues.items()
                if adapter_id is not None
            )
            self._adapters = tuple(adapter_id for _, adapter_id in heads)
        return self._adapters

    def first(self, adapter_id: AdapterId) -> Sequence:
        """The earliest that waits with this adapter. Raises ``KeyError``."""
        return self._queues[adapter_id][0]

    def waiting_for(self, adapter_id: AdapterId) -> list[Sequence]:
        """All that wait with this adapter, in order of arrival; not to be changed."""
        return self._queues.get(adapter_id, [])

    def num_waiting(self, adapter_id: AdapterId) -> int:
        return len(self._queues.get(adapter_id, ()))

    def admissible(self, is_admissible: Callable[[Sequence], bool]) -> Iterator[Sequence]:
        """Yields sequences in order of arrival; each is to be taken out before the next is asked.

        ``is_admissible`` is asked of the first of each adapter and again of every next one; once
        it says no, no later sequence of that adapter comes up.
        """
        heads = [
            (queue[0].sequence_id, queue)
            for queue in self._queues.values()
            if is_admissible(queue[0])
        ]
        heapify(heads)
        while heads:
            queue = heads[0][1]
            yield queue[0]
            if queue and is_admissible(queue[0]):
                heapreplace(heads, (queue[0].sequence_id, queue))
            else:
                heappop(heads)


def _arrival(sequence: Sequence) -> SequenceId:
    return sequence.sequence_id
