"""Sequences that rotation has paused, and the KV blocks that they keep until others lack them.

| state   | blocks                     | left by                                                 |
|---------|----------------------------|---------------------------------------------------------|
| PAUSED  | those of its computed ones | ``went_on``: RUNNING; ``drop_last``: WAITING; ended     |
| WAITING | none: dropped              | ``went_on``, its tokens being computed anew; ended      |

Blocks are dropped for a running sequence that needs one, before any other is preempted for it, and
for one that is admitted, if the paused one stands behind it in line. So nobody waits for blocks of
those who wait for him: a paused sequence that keeps them stands before him, and so does its adapter
on its way into a slot.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.block_manager import BlockManager
from engine.sequence import Sequence, SequenceState


@dataclass(slots=True)
class RotationStats:
    """Counters since the start, and the longest pause after which a sequence went on.

    ``num_rotations`` are turns that were ended, each with a pause for all of its sequences.
    """

    num_rotations: int = 0
    num_pauses: int = 0
    num_dropped_pauses: int = 0
    longest_pause_s: float = 0.0


class PausedSequences:
    """Who is paused since when. Gives blocks to others, and takes them from its own.

    Owned by the step thread; ``Scheduler`` keeps the line in which these sequences wait.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.stats = RotationStats()
        self._blocks = blocks
        self._since_s: dict[Sequence, float] = {}

    def __len__(self) -> int:
        """How many are paused, those without blocks among them."""
        return len(self._since_s)

    def add(self, sequence: Sequence, now_s: float) -> None:
        """The sequence, which runs no longer, is PAUSED."""
        sequence.state = SequenceState.PAUSED
        sequence.num_pauses += 1
        self.stats.num_pauses += 1
        self._since_s[sequence] = now_s

    def went_on(self, sequence: Sequence, now_s: float) -> None:
        """The sequence runs; nothing happens if it was not paused."""
        since_s = self._since_s.pop(sequence, None)
        if since_s is not None:
            self.stats.longest_pause_s = max(self.stats.longest_pause_s, now_s - since_s)

    def ended(self, sequence: Sequence) -> None:
        """The sequence, which does not run, has ended: the blocks that it kept are free."""
        if self._since_s.pop(sequence, None) is not None:
            self._blocks.release(sequence)

    def admit(self, sequence: Sequence, num_spare: int) -> bool:
        """Gives a sequence that waits blocks for all its tokens, so that ``num_spare`` are left.

        False, if too few are free; those behind it in line give theirs only if that can be enough.
        """
        if self._take(sequence, num_spare):
            return True
        behind = (each for each in self._keeping() if each.place > sequence.place)
        num_kept = sum(len(each.block_table) for each in behind)
        if not num_kept or not self.can_admit(sequence, num_spare - num_kept):
            return False
        while self.drop_last(behind=sequence):
            if self._take(sequence, num_spare):
                return True
        # Blocks that they shared with others are not free.
        return False

    def can_admit(self, sequence: Sequence, num_spare: int) -> bool:
        """What ``admit`` would answer if nobody gave blocks for it; changes nothing."""
        if sequence.state is SequenceState.PAUSED:
            return self._blocks.can_extend(sequence, num_spare)
        return self._blocks.can_admit(sequence, num_spare)

    def drop_last(self, behind: Sequence | None = None) -> bool:
        """Takes the blocks of the last in line, of those behind a sequence; False if none is left.

        It is computed anew when it goes on.
        """
        last = max(self._keeping(), key=lambda each: each.place, default=None)
        if last is None or (behind is not None and last.place <= behind.place):
            return False
        self._blocks.release(last)
        last.state = SequenceState.WAITING
        self.stats.num_dropped_pauses += 1
        return True

    def _keeping(self) -> Iterator[Sequence]:
        return (each for each in self._since_s if each.state is SequenceState.PAUSED)

    def _take(self, sequence: Sequence, num_spare: int) -> bool:
        if sequence.state is not SequenceState.PAUSED:
            return self._blocks.admit(sequence, num_spare)
        return self._blocks.can_extend(sequence, num_spare) and self._blocks.extend(sequence)
