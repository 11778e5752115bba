"""Which tokens the next step computes: continuous batching with chunked prefill.

On a CPU a step takes, within ``max_num_batched_tokens``:

1. every running sequence that has one token to compute (decodes),
2. the running sequences that have more (prefills), in order of arrival,
3. those waiting sequences that may begin: see ``engine.admission``.

Beside decodes, prefills get ``chunked_prefill_size`` tokens at most: what they take, decodes wait.
On a GPU, where prefills are launched apart, a step has either 1, or 2 and 3, in turn: see
``engine.step_turns``.

A decode that finds no block, and who has waited longer than ``max_adapter_wait_s`` for an adapter's
slot, take from others that run: see ``engine.displacement``.

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

from engine.adapter_demand import AdapterDemand
from engine.admission import Admission
from engine.block_manager import BlockManager
from engine.cohorts import Cohorts
from engine.config import AdapterLoading
from engine.decodes import Decodes
from engine.displacement import Displacement
from engine.finish_rules import FinishRules
from engine.layer_jobs import LayerJobs, LayerJobStats
from engine.overdue import OverdueWaits
from engine.paused_sequences import PausedSequences, RotationStats
from engine.plan import SampledToken, ScheduledChunk, SequenceProgress, StepPlan
from engine.prefills import Prefills
from engine.residency import AdapterResidency
from engine.rotation import Rotation
from engine.running_sequences import RunningSequences
from engine.scheduler_limits import SchedulerLimits
from engine.scheduler_stats import SchedulerStats
from engine.sequence import Sequence, SequenceState
from engine.step_turns import PrefillRoom, StepTurns
from engine.step_wait import StepWait, StepWaitStats
from engine.waiting_queue import WaitingQueue
from ipc.errors import InvalidRequest
from ipc.messages import AdapterId


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
        self._paused = PausedSequences(blocks)
        self._waiting = WaitingQueue()
        self._overdue = OverdueWaits(self._waiting, demand, limits.max_adapter_wait_s)
        self._step_wait = StepWait(limits.adapter_loading)
        self._layer_jobs = LayerJobs(residency, blocks, limits.max_num_batched_tokens)
        self._prefills = Prefills(self._layer_jobs)
        self._turns: StepTurns | None = None
        if limits.launches_apart:
            most = limits.max_num_batched_tokens
            self._turns = StepTurns(most, min(most, limits.chunked_prefill_size or most))
        self._running = RunningSequences(residency, blocks, self._layer_jobs, rotation)
        self._admission = Admission(
            limits.max_num_seqs,
            self._waiting,
            self._running,
            self._paused,
            residency,
            self._layer_jobs,
            self._prefills,
            self._step_wait,
            self.stats,
            cohorts,
            rotation,
        )
        self._displacement = Displacement(
            self._waiting,
            self._running,
            self._paused,
            blocks,
            self._layer_jobs,
            self._overdue,
            self.stats,
            rotation,
        )
        self._finish = FinishRules(limits)
        self._decodes = Decodes(self._running, self._displacement, self._finish, self._layer_jobs)

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
        return self._admission.held_until_s

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
        overdue = self._overdue.first_overdue(now_s)
        if overdue is not None and self._displacement.rotate(now_s):
            self.meet_demand(now_s)
            overdue = self._overdue.first_overdue(now_s)
        self._layer_jobs.begin_step()
        chunks: list[ScheduledChunk] = []
        self._admission.begin_step()
        if self._turns is None:
            waits = self._plan_together(chunks, overdue, now_s)
        else:
            waits = self._plan_apart(self._turns, chunks, overdue, now_s)
        self._step_wait.update(waits, now_s)
        return StepPlan(() if waits else tuple(chunks), self._layer_jobs.planned)

    def launched(self, plan: StepPlan) -> None:
        """The step is in flight: the tokens that it draws are pending."""
        self._decodes.launched(plan)
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
            reason = self._finish.reason(sequence, token.token_id)
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
        self._decodes.schedule(chunks)
        budget = self._limits.max_num_batched_tokens - len(chunks)
        if chunks and self._limits.chunked_prefill_size is not None:
            budget = min(budget, self._limits.chunked_prefill_size)
        room = PrefillRoom.together(budget)
        self._continue_prefills(chunks, room)
        # What was just preempted would come straight back, and take the blocks it gave.
        if num_preemptions != self.stats.num_preemptions:
            return False
        return self._admission.admit(chunks, room, overdue, now_s)

    def _plan_apart(
        self, turns: StepTurns, chunks: list[ScheduledChunk], overdue: Sequence | None, now_s: float
    ) -> bool:
        """Prefills or decodes, whose turn it is; True if the step has to wait for an adapter."""
        room = turns.begin_step(beside_decodes=self._decodes.are_due())
        self._continue_prefills(chunks, room)
        if self._admission.admit(chunks, room, overdue, now_s):
            return True
        if not chunks and self._layer_jobs.planned is None:
            self._decodes.schedule(chunks)
            turns.take_decodes()
        return False

    def _continue_prefills(self, chunks: list[ScheduledChunk], room: PrefillRoom) -> None:
        for sequence in self._running:
            is_prefill = sequence.num_uncomputed_tokens > 1 or self._layer_jobs.has(sequence)
            if is_prefill and not self._prefills.schedule(chunks, room, sequence):
                return

    def _withdraw(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.RUNNING:
            self._running.stop(sequence)
        else:
            self._layer_jobs.drop(sequence)
            self._waiting.remove(sequence)
            self._paused.ended(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.FINISHED
        if sequence.adapter_id is not None:
            self._residency.drop_request(sequence.adapter_id)
