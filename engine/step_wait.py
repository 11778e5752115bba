"""When a step waits for its adapters: what sets ``--adapter-loading blocking`` apart.

| mode      | a sequence whose adapter is being loaded, but that could run otherwise             |
|-----------|------------------------------------------------------------------------------------|
| overlap   | joins a later step; this one is launched without it                                |
| layerwise | the same, but meanwhile it may go through layers (``engine.layer_jobs``)           |
| blocking  | is in this step, which is launched once the adapter is resident, or will not come  |

Loads, their order and their room are the same in all. A step waits for the sequences that were
there when its wait began; later ones are the next step's affair, as they would be in an engine
that loads inside the step.
"""

from dataclasses import dataclass

from engine.config import AdapterLoading
from engine.sequence import Sequence, SequenceId


@dataclass(slots=True)
class StepWaitStats:
    """Counters since the start: steps that waited for adapters, and how long they did.

    A step that nobody else would have been in counts too.
    """

    num_waits: int = 0
    seconds: float = 0.0


class StepWait:
    """Says for whom the next step may wait, and measures how long steps do.

    Owned by the step thread; ``update`` is called once in every ``Scheduler.schedule``.
    """

    def __init__(self, adapter_loading: AdapterLoading) -> None:
        self.stats = StepWaitStats()
        self._is_blocking = adapter_loading is AdapterLoading.BLOCKING
        self._newest = SequenceId(0)
        # While a step waits: the last sequence that it may wait for.
        self._last: SequenceId | None = None
        self._updated_s = 0.0

    def arrived(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        self._newest = max(self._newest, sequence.sequence_id)

    def may_wait_for(self, sequence: Sequence) -> bool:
        """Whether the step is not to be launched without this sequence, if its load is under way.

        The caller knows that nothing else keeps the sequence from joining.
        """
        return self._is_blocking and (self._last is None or sequence.sequence_id <= self._last)

    def update(self, waits: bool, now_s: float) -> None:
        """The step that was planned just now waits, or does not."""
        if self._last is not None:
            self.stats.seconds += now_s - self._updated_s
        elif waits:
            self.stats.num_waits += 1
            self._last = self._newest
        if not waits:
            self._last = None
        self._updated_s = now_s
