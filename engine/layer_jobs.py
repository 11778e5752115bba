"""Prefills that overlap their own adapter's arrival: ``--adapter-loading layerwise``.

A *job* takes one waiting sequence's first chunk through the decoder layers in groups: in each step
as many as have arrived and as the step's budget allows, at the price of their share of a whole
pass. The sequence goes on waiting for its adapter meanwhile, but holds its KV blocks.

| its sequence is | groups are launched                   | this is left by                        |
|-----------------|---------------------------------------|----------------------------------------|
| WAITING         | of layers that are placed, where room | admission, which finds its adapter     |
|                 | is left behind everybody else         | resident; load or blocks lost: no job  |
| RUNNING         | in its turn, as other prefills        | the last layer; preemption: no job     |

There is one job at a time: loads arrive in the order of the queue, so a second adapter's layers
come when the first one is complete, and its job then ends within the next few steps. A chunk may
be as large as a whole step: what it costs each of its steps is bounded by layers instead.

A waiting job stands in nobody's way. Blocks that someone else could run with are taken from it,
and it does not count against ``max_num_seqs``: it asks for a place when its adapter is there, so
a loader that stalls leaves to all others what they would have without the job. Whenever a job is
lost its sequence begins anew, as if it had never had one; so no group ever follows upon another
one that read an earlier load.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.adapter_slots import PooledAdapter
from engine.block_manager import BlockManager
from engine.plan import LayerGroup, ScheduledChunk
from engine.residency import AdapterResidency
from engine.sequence import Sequence, SequenceState
from engine.waiting_queue import WaitingQueue
from ipc.messages import AdapterId


@dataclass(slots=True)
class LayerJobStats:
    """Counters since the start: jobs whose first group was launched, and groups of all jobs."""

    num_jobs: int = 0
    num_groups: int = 0


@dataclass(slots=True)
class _Job:
    """``chunk`` went through the layers before ``next_layer``, or will in the steps in flight."""

    chunk: ScheduledChunk
    adapter_id: AdapterId | None
    next_layer: int = 0


class LayerJobs:
    """Says which layers of which chunk a step computes beside its other work.

    Owned by the scheduler. ``max_chunk_tokens`` bounds a job's chunk. Where nobody reports which
    stages of a load were placed, there is never a job.
    """

    def __init__(
        self, residency: AdapterResidency, blocks: BlockManager, max_chunk_tokens: int
    ) -> None:
        self.stats = LayerJobStats()
        self._residency = residency
        self._blocks = blocks
        self._max_chunk_tokens = max_chunk_tokens
        self._job: _Job | None = None
        self._planned: LayerGroup | None = None

    @property
    def planned(self) -> LayerGroup | None:
        """What the step that is being scheduled computes of the job."""
        return self._planned

    @property
    def is_free(self) -> bool:
        """Whether a job may begin."""
        return self._job is None

    @property
    def awaits_layers(self) -> bool:
        """Whether the job will go on with what arrives."""
        return self._job is not None and _waits(self._job)

    def has(self, sequence: Sequence) -> bool:
        """Whether the job is this sequence's."""
        return self._job is not None and self._job.chunk.sequence is sequence

    def begin_step(self) -> None:
        """Plans nothing yet. A job whose adapter has lost what was placed of it is dropped."""
        self._planned = None
        job = self._job
        if job is not None and self._num_placed_layers(job) < job.next_layer:
            self.drop(job.chunk.sequence)

    def make_room(self) -> bool:
        """Gives back the blocks of a job that waits; False if there is none."""
        if self._job is None or not _waits(self._job):
            return False
        self.drop(self._job.chunk.sequence)
        return True

    def drop(self, sequence: Sequence) -> None:
        """The sequence, if the job is its own, begins anew: its blocks are given back."""
        if self.has(sequence):
            assert self._planned is None, "what is planned is launched"
            self._job = None
            self._blocks.release(sequence)

    def begin(self, sequence: Sequence) -> None:
        """Begins the job of a running sequence, whose blocks are there."""
        assert self._job is None, "there is one job at a time"
        self._job = self._new_job(sequence)

    def plan(self, budget: int) -> int:
        """Plans the job's next layers for the step; returns their share of ``budget``, above 0.

        At least one layer, if it is there: a large chunk must not be stuck behind small ones. A
        chunk of one token takes all that are there.
        """
        job = self._job
        assert job is not None and self._planned is None, "a step has one group"
        num_layers = self._residency.num_layers
        most = max(1, budget * num_layers // job.chunk.num_tokens)
        layers = range(job.next_layer, min(self._num_placed_layers(job), job.next_layer + most))
        if not layers:
            return 0
        self._planned = LayerGroup(job.chunk, layers, num_layers)
        return min(budget, self._planned.num_tokens)

    def plan_waiting(
        self,
        waiting: WaitingQueue,
        may_begin: Callable[[Sequence], bool],
        budget: int,
        num_running: int,
    ) -> None:
        """As ``plan``, for a sequence that waits for its adapter; begins a job if there is none.

        To be called when everybody who can be admitted was, and neither blocks nor places ran out.
        ``may_begin`` says whether anything but its adapter keeps a sequence waiting.
        """
        if self._job is None:
            self._begin_waiting(waiting, may_begin, num_running)
        job = self._job
        if job is not None and _waits(job) and may_begin(job.chunk.sequence):
            self.plan(budget)

    def launched(self, group: LayerGroup) -> None:
        """What was planned is in flight."""
        job = self._job
        assert job is not None and group is self._planned, "a plan is launched as it was made"
        self.stats.num_jobs += job.next_layer == 0
        self.stats.num_groups += 1
        job.next_layer = group.layers.stop
        self._planned = None
        if group.is_last:
            self._job = None

    def _begin_waiting(
        self, waiting: WaitingQueue, may_begin: Callable[[Sequence], bool], num_running: int
    ) -> None:
        """The earliest sequence whose adapter is there in part, if there are blocks for it."""
        arriving = filter(_has_begun_to_arrive, self._residency.loads())
        firsts = (
            waiting.first(adapter.adapter_id)
            for adapter in arriving
            if waiting.num_waiting(adapter.adapter_id)
        )
        # Who is paused has been through all layers, and keeps what came of it.
        candidates = (
            each for each in firsts if each.state is SequenceState.WAITING and may_begin(each)
        )
        sequence = min(candidates, key=lambda each: each.place, default=None)
        if sequence is not None and self._blocks.admit(sequence, num_spare=num_running):
            self._job = self._new_job(sequence)

    def _new_job(self, sequence: Sequence) -> _Job:
        num_tokens = min(sequence.num_uncomputed_tokens, self._max_chunk_tokens)
        samples = num_tokens == sequence.num_uncomputed_tokens
        chunk = ScheduledChunk(sequence, sequence.num_computed_tokens, num_tokens, samples)
        return _Job(chunk, sequence.adapter_id)

    def _num_placed_layers(self, job: _Job) -> int:
        if job.adapter_id is None:
            return self._residency.num_layers
        return self._residency.num_placed_layers(job.adapter_id)


def _waits(job: _Job) -> bool:
    return job.chunk.sequence.state is SequenceState.WAITING


def _has_begun_to_arrive(adapter: PooledAdapter) -> bool:
    return adapter.num_placed_layers > 0
