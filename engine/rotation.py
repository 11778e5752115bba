"""Whose turn in the adapter pool is over: what keeps endless streams from holding every slot.

An adapter's *turn* begins when a sequence begins to run with it while none did, and ends when none
does any more. A turn has *lasted* after ``max_adapter_wait_s``, once each of its sequences has
drawn a token in it. When somebody has waited too long for a slot, the turns that have lasted are
ended, the longest first and as many as make room for the first in line: their sequences are
paused. They give their adapter back, keep their KV blocks, and wait at the end of the line.

| what                                       | why                                               |
|--------------------------------------------|---------------------------------------------------|
| the end of the line, not their old place   | they would take the slot right back               |
| nobody is paused if it makes too little    | the first in line would get nothing by it         |
| room                                       |                                                   |
| a turn lasts, and whoever waits for its    | loads cost time: no adapter comes for a token, or |
| adapter joins it until then                | for one sequence out of many                      |
| a token for each sequence                  | whatever is computed anew, every turn is progress |
| not pinned ones                            | their slots never go to others                    |
| not unregistered ones                      | their files may be gone: they could not come back |

The bound. Let ``W`` be ``max_adapter_wait_s``, ``L`` the longest load, and ``P`` the longest time
from a sequence's admission to the first token that it draws. Of an adapter that begins to wait for
a slot, let ``r`` others have unfinished sequences that stand before it. Who comes or is paused
later stands behind it. Once it has waited ``W``, whoever is first in line finds room within
``T = L + W + P``: by then every slot has been filled, and its turn has lasted. So the adapter is
resident within ``W + (r + 1) * T + L``. That holds for a pause as for a request, as a paused
sequence waits like any other. It presumes a loader, room beside the pinned adapters, and that a
sequence whose adapter is resident finds a place in the batch and KV blocks, which go by the line.

Steps that wait for their adapters rotate like others: endless streams hold slots in every mode of
``--adapter-loading``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.adapter_slots import AdapterSlots
from engine.residency import AdapterResidency
from engine.sequence import Sequence
from ipc.messages import AdapterId


@dataclass(slots=True)
class _Turn:
    """``num_drawn`` is what each running sequence had drawn when it joined."""

    since_s: float
    num_drawn: dict[Sequence, int] = field(default_factory=dict)

    def has_lasted(self, now_s: float, least_s: float) -> bool:
        return now_s - self.since_s >= least_s and all(
            sequence.num_drawn_tokens > num_drawn for sequence, num_drawn in self.num_drawn.items()
        )


class Rotation:
    """Knows every adapter's turn, and says which are to end. Owned by the step thread."""

    def __init__(
        self, residency: AdapterResidency, slots: AdapterSlots, least_turn_s: float
    ) -> None:
        self._residency = residency
        self._slots = slots
        self._least_turn_s = least_turn_s
        # In the order of their beginnings.
        self._turns: dict[AdapterId, _Turn] = {}

    def started(self, sequence: Sequence, now_s: float) -> None:
        """The sequence runs."""
        if sequence.adapter_id is not None:
            turn = self._turns.setdefault(sequence.adapter_id, _Turn(now_s))
            turn.num_drawn[sequence] = sequence.num_drawn_tokens

    def stopped(self, sequence: Sequence) -> None:
        """The sequence runs no longer."""
        if sequence.adapter_id is not None:
            turn = self._turns[sequence.adapter_id]
            del turn.num_drawn[sequence]
            if not turn.num_drawn:
                del self._turns[sequence.adapter_id]

    def may_join(self, adapter_id: AdapterId, now_s: float) -> bool:
        """Whether the adapter has a turn, and for less than the least time."""
        turn = self._turns.get(adapter_id)
        return turn is not None and now_s - turn.since_s < self._least_turn_s

    def running(self, adapter_id: AdapterId) -> list[Sequence]:
        """The sequences of the adapter's turn, in the order in which they joined it."""
        return list(self._turns[adapter_id].num_drawn)

    def turns_to_end(
        self, first: AdapterId, order: Iterable[AdapterId], now_s: float
    ) -> list[AdapterId]:
        """Whose turns are to end so that ``first`` finds room; none if that is in vain.

        ``order`` is that of the line; ``first`` found no room although all were evicted that may
        be. Where only the holes are too short, one turn ends at a time.
        """
        lasted = [
            adapter
            for adapter in map(self._residency.adapter, self._turns)
            if not adapter.pinned
            and not adapter.removed
            and self._turns[adapter.adapter_id].has_lasted(now_s, self._least_turn_s)
        ]
        if not lasted:
            return []
        position = {adapter_id: place for place, adapter_id in enumerate(order)}
        missing = self._slots.missing_bytes(self._residency.adapter(first), position)
        for count, adapter in enumerate(lasted, 1):
            missing -= adapter.num_slot_bytes
            if missing <= 0:
                return [each.adapter_id for each in lasted[:count]]
        return []
