"""Which tokens the next step computes: continuous batching with chunked prefill.

On a CPU a step takes, within ``max_num_batched_tokens``:

1. every running sequence that has one token to compute (decodes),
2. the running sequences that have more (prefills), in order of arrival,
3. waiting sequences whose adapter is wholly resident, in order of arrival, as long as there are
   KV blocks for all their tokens and one to spare for every running sequence.

Beside decodes, prefills get ``chunked_prefill_size`` tokens at most: what they take, decodes wait.
On a GPU, where prefills are launched apart, a step has either 1, or 2 and 3, in turn: see
``engine.step_turns``.

When a decode finds no block, the running sequence that arrived last goes back to waiting and is
computed anew later; its place in the queue is still the one that it had.

Where cohorts are wanted, sequences that could begin with their adapter are held back for others
whose adapters are about to arrive, if that makes the sum of their waits shorter.

Else no sequence waits for another one's adapter, but for this: once a sequence has waited for a
slot longer than ``max_adapter_wait_s``, no later one is admitted with an unpinned adapter, so that
the slots fall idle and one of them becomes free. Sequences of the base model go on. Where adapters
rotate (see ``engine.rotation``), later ones may still join an adapter's turn, and turns that have
lasted are ended: their sequences are paused, and wait at the end of the line with their blocks.

With ``--adapter-loading blocking`` they do wait: see ``engine.step_wait``. A step that waits is
planned anew until it may go. What it has admitted by then runs, without having been in a step;
nothing is lost, as a sequence's progress counts from the launch alone.

With ``--adapter-loading layerwise`` a sequence that waits for its adapter alone goes through those
layers that have arrived, behind everything else in the step: see ``engine.layer_jobs``.

Steps overlap: step n+1 is scheduled and launched while step n runs, so before it is known which
tokens n draws. A sequence whose newest token is *pending* is scheduled like any other; only if it
ends by its length, which is known in advance, it is left out. If n turns out to end it, what n+1
computes for it is dropped.

Whatever ends, is preempted or paused gives its blocks (a paused one when others need them) and its
adapter back at once, although a step in flight may still read and write there. That is safe because
of these four:

- Steps run in the order of their launches. A block's next owner writes a place before it reads it,
  in steps launched later: what a late write left there is overwritten first.
- A step writes only into blocks that its sequence alone holds and that are not published. A block
  is published when the step that filled it is complete, if its sequence still holds it: what that
  one has in flight lies behind the block. What an ended one has in flight goes into blocks that
  were not published; who gets them next can publish them only after a later step. So no write in
  flight reaches a block that anybody finds.
- A preempted or paused sequence still takes the token that it has in flight, drawn from blocks that
  nobody could overwrite before; it is admitted again only when none of its tokens is pending.
- An adapter's slot is written only behind all steps that read it before it was given away.
"""

import logging
from bisect import bisect_left, insort
from dataclasses import dataclass

from engine.adapter_demand import AdapterDemand
from engine.block_manager import BlockManager
from engine.cohorts import Cohorts
from engine.config import AdapterLoading
from engine.layer_jobs import LayerJobs, LayerJobStats
from engine.paused_sequences import PausedSequences, RotationStats
from engine.plan import SampledToken, ScheduledChunk, SequenceProgress, StepPlan
from engine.residency import AdapterResidency
from engine.rotation import Rotation
from engine.sequence import Sequence, SequenceId, SequenceState
from engine.step_turns import PrefillRoom, StepTurns
from engine.step_wait import StepWait, StepWaitStats
from engine.waiting_queue import WaitingQueue
from ipc.errors import InvalidRequest
from ipc.messages import AdapterId, FinishReason

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step and a sequence are bounded by; ``max_sequence_tokens`` is prompt and output.

    With ``launches_apart`` no step has both decodes and prefills.

    Raises:
        InvalidRequest: a full batch of decodes would not fit into a step.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_sequence_tokens: int
    max_adapter_wait_s: float
    eos_token_ids: frozenset[int]
    adapter_loading: AdapterLoading
    chunked_prefill_size: int | None = None
    launches_apart: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise InvalidRequest(
                "max_num_batched_tokens: expected at least max_num_seqs"
                f" ({self.max_num_seqs}), got {self.max_num_batched_tokens}"
            )


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start. A preempted sequence's prompt counts once.

    ``num_held_steps`` are those that could have begun a prefill which was held back for a cohort.
    """

    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_held_steps: int = 0


class Scheduler:
    """Owns all sequences between ``add`` and their end, and says what each step computes.

    Owned by the step thread. A plan that is not empty is launched, and ``launched`` called, before
    the next ``schedule``; ``complete`` is called in the order of the launches, with at most one
    step in flight at each ``schedule``. ``add``, ``abort`` and ``fail_adapter`` may come at any
    time but between ``schedule`` and ``launched``, ``fail_adapter`` even then.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        residency: AdapterResidency,
        demand: AdapterDemand,
        cohorts: Cohorts | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        """``cohorts`` None: nobody is held back for others; ``rotation`` None: nobody is paused.

        Raises:
            InvalidRequest: cohorts, although no step goes on while adapters arrive.
        """
        if cohorts is not None and limits.adapter_loading is AdapterLoading.BLOCKING:
            raise InvalidRequest(
                "adapter_cohorts: expected only with --adapter-loading overlap or layerwise,"
                " got blocking"
            )
        self.stats = SchedulerStats()
        self._limits = limits
        self._blocks = blocks
        self._residency = residency
        self._demand = demand
        self._cohorts = cohorts
        self._rotation = rotation
        self._paused = PausedSequences(blocks)
        self._held_until_s: float | None = None
        self._waiting = WaitingQueue()
        self._step_wait = StepWait(limits.adapter_loading)
        self._layer_jobs = LayerJobs(residency, blocks, limits.max_num_batched_tokens)
        self._turns: StepTurns | None = None
        if limits.launches_apart:
            most = limits.max_num_batched_tokens
            self._turns = StepTurns(most, min(most, limits.chunked_prefill_size or most))
        # In order of arrival.
        self._running: list[Sequence] = []
        # Where in what the last launched step draws each sequence's token is.
        self._sample_indices: dict[SequenceId, int] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Those that are paused among them."""
        return len(self._waiting)

    @property
    def num_paused(self) -> int:
        return len(self._paused)

    @property
    def rotation_stats(self) -> RotationStats:
        return self._paused.stats

    @property
    def num_waiting_for_adapter(self) -> int:
        """Waiting sequences whose adapter is not resident."""
        return sum(
            self._waiting.num_waiting(adapter_id)
            for adapter_id in self._waiting.adapters()
            if not self._residency.is_resident(adapter_id)
        )

    @property
    def step_waits(self) -> StepWaitStats:
        return self._step_wait.stats

    @property
    def layer_jobs(self) -> LayerJobStats:
        return self._layer_jobs.stats

    @property
    def awaits_layers(self) -> bool:
        """Whether a prefill is under way whose adapter is still arriving."""
        return self._layer_jobs.awaits_layers

    @property
    def awaits_tokens(self) -> bool:
        """Whether all steps in flight are to be completed before the next ``schedule``.

        So it is when a token is pending in a sequence with penalties: the next draw counts it.
        """
        return any(each.num_pending_tokens and each.has_penalty for each in self._running)

    @property
    def held_until_s(self) -> float | None:
        """When ``schedule`` may find more to do by itself; None if only an event can bring that."""
        return self._held_until_s

    def step_took(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens, all through all layers, kept the device busy for so long."""
        if self._cohorts is not None:
            self._cohorts.costs.observe(num_tokens, seconds)

    def add(self, sequence: Sequence) -> None:
        """The sequence waits; its adapter is in demand from the next ``schedule`` on.

        Raises:
            InvalidRequest: it could never run, however long it waits.
        """
        longest = self._limits.max_sequence_tokens
        if not 0 < len(sequence.token_ids) < longest:
            raise InvalidRequest(
                f"the prompt has {len(sequence.token_ids)} tokens: expected 1 to {longest - 1},"
                f" so that one can be generated within {longest}",
                param="prompt",
            )
        if sequence.adapter_id is not None:
            self._residency.add_request(sequence.adapter_id)
        self._waiting.add(sequence)
        self._step_wait.arrived(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends the sequence without an answer; nothing happens if it has ended already."""
        if sequence.state is SequenceState.FINISHED:
            return
        self._withdraw(sequence)
        self._end(sequence)

    def fail_adapter(self, adapter_id: AdapterId) -> list[Sequence]:
        """Ends all sequences that wait for the adapter; they are the caller's to answer."""
        failed = self._waiting.remove_all(adapter_id)
        for sequence in failed:
            self._layer_jobs.drop(sequence)
            self._paused.ended(sequence)
            self._end(sequence)
        return failed

    def meet_demand(self, now_s: float) -> None:
        """Begins the loads for which there is room now; part of every ``schedule``."""
        self._demand.meet(self._waiting.adapters(), now_s)

    def schedule(self, now_s: float) -> StepPlan:
        """What the next step computes; empty if nothing can run, or if it waits for adapters.

        Loads that begin and evictions are among the residency's actions, to be carried out before
        the step is launched.
        """
        self.meet_demand(now_s)
        overdue = self._find_overdue(now_s)
        if overdue is not None and self._rotate(now_s):
            self.meet_demand(now_s)
            overdue = self._find_overdue(now_s)
        self._layer_jobs.begin_step()
        chunks: list[ScheduledChunk] = []
        self._held_until_s = None
        if self._turns is None:
            waits = self._plan_together(chunks, overdue, now_s)
        else:
            waits = self._plan_apart(self._turns, chunks, overdue, now_s)
        self._step_wait.update(waits, now_s)
        return StepPlan(() if waits else tuple(chunks), self._layer_jobs.planned)

    def launched(self, plan: StepPlan) -> None:
        """The step is in flight: the tokens that it draws are pending."""
        self._sample_indices = {}
        self._residency.step_launched(plan.adapter_ids)
        if self._turns is not None:
            self._turns.launched(plan)
        if plan.layer_group is not None:
            self._layer_jobs.launched(plan.layer_group)
        for chunk in plan.completed_chunks:
            sequence = chunk.sequence
            assert sequence.state is SequenceState.RUNNING, "a plan is launched as it was made"
            sequence.num_computed_tokens = chunk.start + chunk.num_tokens
            if chunk.samples:
                sequence.num_pending_tokens += 1
                self._sample_indices[sequence.sequence_id] = len(self._sample_indices)

    def complete(self, plan: StepPlan, sampled: list[SampledToken]) -> list[SequenceProgress]:
        """Takes in what the step computed: its tokens, and who has ended with them.

        ``sampled`` has one token for each chunk that samples, in their order. The token that ends
        a sequence is reported like any other. A sequence that ended while the step was in flight
        is not in the answer.
        """
        self._residency.step_completed()
        tokens = iter(sampled)
        progress: list[SequenceProgress] = []
        for chunk in plan.completed_chunks:
            token = next(tokens) if chunk.samples else None
            sequence = chunk.sequence
            if sequence.state is SequenceState.FINISHED:
                continue
            if sequence.state is not SequenceState.WAITING:
                self._blocks.publish(sequence, chunk.start, chunk.start + chunk.num_tokens)
            if token is None:
                continue
            sequence.num_pending_tokens -= 1
            sequence.token_ids.append(token.token_id)
            self.stats.num_generated_tokens += 1
            reason = self._finish_reason(sequence, token.token_id)
            if reason is not None:
                sequence.finish_reason = reason
                self._withdraw(sequence)
                self._end(sequence)
            progress.append(SequenceProgress(sequence, token, reason))
        assert next(tokens, None) is None, "more tokens were sampled than the plan asked for"
        return progress

    def assert_idle(self) -> None:
        """Checks that nothing is lost when every sequence has ended. Raises ``Internal``."""
        assert not self._running and not len(self._waiting) and not len(self._paused), (
            "sequences have not ended"
        )
        self._blocks.assert_idle()

    def _plan_together(
        self, chunks: list[ScheduledChunk], overdue: Sequence | None, now_s: float
    ) -> bool:
        """Decodes, and prefills behind them; True if the step has to wait for an adapter."""
        num_preemptions = self.stats.num_preemptions
        self._schedule_decodes(chunks)
        budget = self._limits.max_num_batched_tokens - len(chunks)
        if chunks and self._limits.chunked_prefill_size is not None:
            budget = min(budget, self._limits.chunked_prefill_size)
        room = PrefillRoom.together(budget)
        self._continue_prefills(chunks, room)
        # What was just preempted would come straight back, and take the blocks it gave.
        if num_preemptions != self.stats.num_preemptions:
            return False
        return self._admit(chunks, room, overdue, now_s)

    def _plan_apart(
        self, turns: StepTurns, chunks: list[ScheduledChunk], overdue: Sequence | None, now_s: float
    ) -> bool:
        """Prefills or decodes, whose turn it is; True if the step has to wait for an adapter."""
        room = turns.begin_step(beside_decodes=any(map(self._may_decode, self._running)))
        self._continue_prefills(chunks, room)
        if self._admit(chunks, room, overdue, now_s):
            return True
        if not chunks and self._layer_jobs.planned is None:
            self._schedule_decodes(chunks)
            turns.take_decodes()
        return False

    def _schedule_decodes(self, chunks: list[ScheduledChunk]) -> None:
        # A copy, as preemption takes from its end: those are skipped by their state.
        for sequence in tuple(self._running):
            if sequence.state is not SequenceState.RUNNING or not self._may_decode(sequence):
                continue
            assert not self._layer_jobs.has(sequence), "a job of one token ends when it is admitted"
            if self._extend(sequence):
                chunks.append(self._decode(sequence))

    def _may_decode(self, sequence: Sequence) -> bool:
        if sequence.num_uncomputed_tokens != 1:
            return False
        # Without a pending token it would have ended.
        return not sequence.num_pending_tokens or not self._reaches_length(sequence)

    def _continue_prefills(self, chunks: list[ScheduledChunk], room: PrefillRoom) -> None:
        for sequence in self._running:
            is_prefill = sequence.num_uncomputed_tokens > 1 or self._layer_jobs.has(sequence)
            if is_prefill and not self._schedule_prefill(chunks, room, sequence):
                return

    def _schedule_prefill(
        self, chunks: list[ScheduledChunk], room: PrefillRoom, sequence: Sequence
    ) -> bool:
        """Gives a running sequence of what is left; False if that is nothing."""
        if not self._has_place(room, sequence):
            return False
        if self._goes_by_layers(room, sequence):
            if not self._layer_jobs.has(sequence):
                self._layer_jobs.begin(sequence)
            room.take_layers(self._layer_jobs.plan(room.for_layers))
        else:
            room.take_chunk(_add_chunk(chunks, sequence, room.for_chunks))
        return True

    def _goes_by_layers(self, room: PrefillRoom, sequence: Sequence) -> bool:
        if self._layer_jobs.has(sequence):
            return True
        return room.is_too_small_for(sequence.num_uncomputed_tokens) and self._layer_jobs.is_free

    def _has_place(self, room: PrefillRoom, sequence: Sequence) -> bool:
        """Whether the step has room for a part of the sequence's prefill."""
        if self._goes_by_layers(room, sequence):
            return room.for_layers > 0
        return room.takes_chunk_of(sequence.num_uncomputed_tokens)

    def _decode(self, sequence: Sequence) -> ScheduledChunk:
        pending_from = None
        if sequence.num_pending_tokens:
            pending_from = self._sample_indices[sequence.sequence_id]
        return ScheduledChunk(sequence, sequence.num_computed_tokens, 1, True, pending_from)

    def _extend(self, sequence: Sequence) -> bool:
        """Gets the block for one more token; False if the sequence itself had to make room."""
        while not self._blocks.extend(sequence):
            if self._layer_jobs.make_room() or self._paused.drop_last():
                continue
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        logger.debug("request %s is preempted", sequence.request_id)
        self._stop_running(sequence)
        sequence.state = SequenceState.WAITING
        sequence.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._waiting.add(sequence)

    def _rotate(self, now_s: float) -> bool:
        """Makes room for the first in line that has found none; False if that is in vain."""
        if self._rotation is None:
            return False
        order = self._waiting.adapters()
        first = next(each for each in order if self._demand.blocked_since_s(each) is not None)
        ended = self._rotation.turns_to_end(first, order, now_s)
        for adapter_id in ended:
            # They had their chance while the turn lasted; before ``first`` they would keep the
            # slot. They come before those that are paused now when it is their turn again.
            self._waiting.send_back(adapter_id, self._waiting.first(first).place)
            for sequence in self._rotation.running(adapter_id):
                self._pause(sequence, now_s)
        return bool(ended)

    def _pause(self, sequence: Sequence, now_s: float) -> None:
        logger.debug("request %s is paused", sequence.request_id)
        self._stop_running(sequence, keeps_blocks=True)
        self._paused.add(sequence, now_s)
        self._waiting.add_last(sequence)

    def _admit(
        self,
        chunks: list[ScheduledChunk],
        room: PrefillRoom,
        overdue: Sequence | None,
        now_s: float,
    ) -> bool:
        """Adds waiting sequences; True if the step has to wait for the next one's adapter."""
        if not self._may_admit(room) or not len(self._waiting):
            return False
        if self._cohorts is not None:
            self._held_until_s = self._cohorts.held_until_s(
                self._waiting, self._residency, len(self._running), now_s
            )
        is_held = self._held_until_s is not None
        self.stats.num_held_steps += is_held

        def may_begin(sequence: Sequence) -> bool:
            # Paused just now.
            if sequence.num_pending_tokens:
                return False
            if sequence.adapter_id is None:
                return True
            # Who has begun a job can be in no cohort any more.
            if is_held and not self._layer_jobs.has(sequence):
                return False
            if overdue is None or sequence.place < overdue.place:
                return True
            if self._rotation is not None and self._rotation.may_join(sequence.adapter_id, now_s):
                return True
            return self._residency.is_pinned(sequence.adapter_id)

        def is_admissible(sequence: Sequence) -> bool:
            adapter_id = sequence.adapter_id
            is_there = (
                adapter_id is None
                or self._residency.is_resident(adapter_id)
                or (self._step_wait.may_wait_for(sequence) and self._is_in_load(sequence))
            )
            return is_there and may_begin(sequence)

        for sequence in self._waiting.admissible(is_admissible):
            # Only a blocking engine gets here; without blocks the step could not have it anyway.
            if self._is_in_load(sequence):
                return self._paused.can_admit(sequence, num_spare=len(self._running))
            # Without blocks the earliest waits, and a shorter later one must not overtake it; nor
            # where a step's room is too small for what would fit into the next one whole.
            if not self._has_place(room, sequence):
                return False
            if not self._layer_jobs.has(sequence) and not self._admit_to_blocks(sequence):
                return False
            self._start_running(sequence, now_s)
            self._schedule_prefill(chunks, room, sequence)
            if not self._may_admit(room):
                return False
        if room.for_layers:
            self._layer_jobs.plan_waiting(
                self._waiting, may_begin, room.for_layers, len(self._running)
            )
        return False

    def _admit_to_blocks(self, sequence: Sequence) -> bool:
        num_spare = len(self._running)
        return self._paused.admit(sequence, num_spare) or (
            self._layer_jobs.make_room() and self._paused.admit(sequence, num_spare)
        )

    def _is_in_load(self, sequence: Sequence) -> bool:
        adapter_id = sequence.adapter_id
        return adapter_id is not None and self._residency.is_loading(adapter_id)

    def _may_admit(self, room: PrefillRoom) -> bool:
        return not room.is_full and len(self._running) < self._limits.max_num_seqs

    def _find_overdue(self, now_s: float) -> Sequence | None:
        """The first in line that has waited too long for a slot."""
        # With hundreds waiting, to look at each in every step would cost too much.
        longest_s = self._demand.longest_blocked_since_s
        if longest_s is None or now_s - longest_s <= self._limits.max_adapter_wait_s:
            return None
        for adapter_id in self._waiting.adapters():
            blocked_s = self._demand.blocked_since_s(adapter_id)
            if blocked_s is None:
                continue
            first = self._waiting.first(adapter_id)
            if now_s - max(blocked_s, first.arrival_s) > self._limits.max_adapter_wait_s:
                return first
        return None

    def _start_running(self, sequence: Sequence, now_s: float) -> None:
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_arrival)
        sequence.state = SequenceState.RUNNING
        if sequence.adapter_id is not None:
            self._residency.acquire(sequence.adapter_id)
        self._paused.went_on(sequence, now_s)
        if self._rotation is not None:
            self._rotation.started(sequence, now_s)
        if not sequence.num_preemptions and not sequence.num_pauses:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.stats.num_prompt_tokens += sequence.num_prompt_tokens
            self.stats.num_cached_prompt_tokens += sequence.num_cached_tokens

    def _withdraw(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.RUNNING:
            self._stop_running(sequence)
        else:
            self._layer_jobs.drop(sequence)
            self._waiting.remove(sequence)
            self._paused.ended(sequence)

    def _stop_running(self, sequence: Sequence, keeps_blocks: bool = False) -> None:
        index = bisect_left(self._running, sequence.sequence_id, key=_arrival)
        assert self._running[index] is sequence, "only a running sequence is stopped"
        del self._running[index]
        self._layer_jobs.drop(sequence)
        if not keeps_blocks:
            self._blocks.release(sequence)
        if self._rotation is not None:
            self._rotation.stopped(sequence)
        if sequence.adapter_id is not None:
            self._residency.release(sequence.adapter_id)

    def _end(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.FINISHED
        if sequence.adapter_id is not None:
            self._residency.drop_request(sequence.adapter_id)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        num_output_tokens = sequence.num_output_tokens
        if num_output_tokens >= sampling.min_tokens:
            ends = not sampling.ignore_eos and token_id in self._limits.eos_token_ids
            if ends or token_id in sampling.stop_token_ids:
                return FinishReason.STOP
        # A step that draws one more was launched only if this was not to be the last.
        if not sequence.num_pending_tokens and self._reaches_length(sequence):
            return FinishReason.LENGTH
        return None

    def _reaches_length(self, sequence: Sequence) -> bool:
        """Whether no token may follow those that are drawn, pending ones among them."""
        return (
            sequence.num_drawn_tokens >= sequence.max_tokens
            or sequence.num_tokens >= self._limits.max_sequence_tokens
        )


def _add_chunk(chunks: list[ScheduledChunk], sequence: Sequence, budget: int) -> int:
    """Schedules as much of the sequence as ``budget`` allows; returns how much."""
    start = sequence.num_computed_tokens
    num_uncomputed = sequence.num_uncomputed_tokens
    num_tokens = min(num_uncomputed, budget)
    samples = num_tokens == num_uncomputed
    chunks.append(ScheduledChunk(sequence, start, num_tokens, samples))
    return num_tokens


def _arrival(sequence: Sequence) -> SequenceId:
    return sequence.sequence_id
