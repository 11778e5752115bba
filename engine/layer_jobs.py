"""Prefills that go through the decoder layers in groups, over several steps.

A *job* does so with one sequence's next chunk: in each step as many layers as have arrived and as
the step's budget allows, at the price of their share of a whole pass. There are two reasons for it:

- With ``--adapter-loading layerwise`` a prefill overlaps its own adapter's arrival. The sequence
  goes on waiting for its adapter meanwhile, but holds its KV blocks.
- A prefill is too long for what a step may have of it between two decodes (``engine.step_turns``).

| its sequence is | groups are launched                   | this is left by                        |
|-----------------|---------------------------------------|----------------------------------------|
| WAITING         | of layers that are placed, where room | admission, which finds its adapter     |
|                 | is left behind everybody else         | resident; load or blocks lost: no job  |
| RUNNING         | in its turn, as other prefills        | the last layer; preemption: no job     |

There is one job at a time: loads arrive in the order of the queue, so a second adapter's layers
come when the first one is complete, and its job then ends within the next few steps. A chunk may
be as large as a whole step: what it costs each of its steps is bounded by layers instead.

Nor does a job begin where two sequences wait for the adapter that fit into one step together: the
first would gain a part of one pass, and all others wait for a decode and a pass more.

A waiting job stands in nobody's way. Blocks that someone else could run with are taken from it,
and it does not count against ``max_num_seqs``: it asks for a place when its adapter is there, so
a loader that stalls leaves to all others what they would have without the job. Whenever a job is
lost its sequence begins anew, as if it had never had one; nor does a group of one load under way
follow upon another one's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from engine.adapter_slots import PooledAdapter
from engine.block_manager import BlockManager
from engine.plan import LayerGroup, ScheduledChunk
from engine.residency import AdapterResidency
from engine.sequence import Sequence, SequenceState
from engine.waiting_queue import WaitingQueue
from ipc.messages import AdapterId, LoadId


@dataclass(slots=True)
class LayerJobStats:
    """Counters since the start: jobs whose first group was launched, and groups of all jobs."""

    num_jobs: int = 0
    num_groups: int = 0


@dataclass(slots=True)
class _Job:
    """``chunk`` went through the layers before ``next_layer``, or will in the steps in flight.

    ``load_id`` is what was under way when it began; None if nothing was.
    """

    chunk: ScheduledChunk
    adapter_id: AdapterId | None
    load_id: LoadId | None
    next_layer: int = 0


class LayerJobs:
    """Says which layers of which chunk a step computes beside its other work.

    Owned by the scheduler. ``max_chunk_tokens`` bounds a job's chunk. Where nobody reports which
    stages of a load were placed, no sequence that waits has a job.
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
        if job is not None and self._has_lost_layers(job):
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
        longest: int | None,
        num_running: int,
    ) -> None:
        """As ``plan``, for a sequence that waits for its adapter; begins a job if there is none.

        To be called when everybody who can be admitted was, and neither blocks nor places ran out.
        ``may_begin`` says whether anything but its adapter keeps a sequence waiting; prefills of
        ``longest`` tokens together fit into one step (None: as many as a job's chunk may have).
        """
        if self._job is None:
            longest = longest or self._max_chunk_tokens
            self._begin_waiting(waiting, may_begin, longest, num_running)
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
        self,
        waiting: WaitingQueue,
        may_begin: Callable[[Sequence], bool],
        longest: int,
        num_running: int,
    ) -> None:
        """The earliest sequence whose adapter is there in part, if there are blocks for it."""
        arriving = filter(_has_begun_to_arrive, self._residency.loads())
        firsts = (
            waiting.first(adapter.adapter_id)
            for adapter in arriving
            if waiting.num_waiting(adapter.adapter_id)
            and not _would_batch(waiting, adapter.adapter_id, longest)
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
        return _Job(chunk, sequence.adapter_id, self._load_id(sequence.adapter_id))

    def _load_id(self, adapter_id: AdapterId | None) -> LoadId | None:
        return None if adapter_id is None else self._residency.adapter(adapter_id).load_id

    def _has_lost_layers(self, job: _Job) -> bool:
        if self._num_placed_layers(job) < job.next_layer:
            return True
        # A next load can have come as far while the step before was running.
        return self._load_id(job.adapter_id) not in (None, job.load_id)

    def _num_placed_layers(self, job: _Job) -> int:
        if job.adapter_id is None:
            return self._residency.num_layers
        return self._residency.num_placed_layers(job.adapter_id)


def _waits(job: _Job) -> bool:
    return job.chunk.sequence.state is SequenceState.WAITING


def _would_batch(waiting: WaitingQueue, adapter_id: AdapterId, longest: int) -> bool:
    """Whether the first two that wait for the adapter fit into one step."""
    firsts = [each.num_uncomputed_tokens for each in islice(waiting.waiting_for(adapter_id), 2)]
    return len(firsts) > 1 and sum(firsts) <= longest


def _has_begun_to_arrive(adapter: PooledAdapter) -> bool:
    return adapter.num_placed_layers > 0
