"""The sequences that run, and what each of them holds while it does."""

from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.block_manager import BlockManager
from engine.layer_jobs import LayerJobs
from engine.residency import AdapterResidency
from engine.rotation import Rotation
from engine.sequence import Sequence, SequenceId, SequenceState


class RunningSequences:
    """Who runs, in order of arrival. From ``start`` to ``stop`` a sequence's adapter is in use.

    ``rotation`` None: adapters have no turns. Owned by the step thread.
    """

    def __init__(
        self,
        residency: AdapterResidency,
        blocks: BlockManager,
        layer_jobs: LayerJobs,
        rotation: Rotation | None,
    ) -> None:
        self._residency = residency
        self._blocks = blocks
        self._layer_jobs = layer_jobs
        self._rotation = rotation
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def last(self) -> Sequence:
        """Who arrived last; there has to be one."""
        return self._sequences[-1]

    def start(self, sequence: Sequence, now_s: float) -> None:
        """The sequence, which has its blocks and waits no longer, is RUNNING."""
        insort(self._sequences, sequence, key=_arrival)
        sequence.state = SequenceState.RUNNING
        if sequence.adapter_id is not None:
            self._residency.acquire(sequence.adapter_id)
        if self._rotation is not None:
            self._rotation.started(sequence, now_s)

    def stop(self, sequence: Sequence, keeps_blocks: bool = False) -> None:
        """The sequence runs no longer, and its job, if it has one, ends.

        What its state is now the caller says.
        """
        index = bisect_left(self._sequences, sequence.sequence_id, key=_arrival)
        assert self._sequences[index] is sequence, "only a running sequence is stopped"
        del self._sequences[index]
        self._layer_jobs.drop(sequence)
        if not keeps_blocks:
            self._blocks.release(sequence)
        if self._rotation is not None:
            self._rotation.stopped(sequence)
        if sequence.adapter_id is not None:
            self._residency.release(sequence.adapter_id)


def _arrival(sequence: Sequence) -> SequenceId:
    return sequence.sequence_id
