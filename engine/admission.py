"""Which of the waiting sequences begin to run with the next step.

Those whose adapter is wholly resident do, in the order of the line, as long as there are places in
the batch, tokens in the step, and KV blocks for all their tokens and one to spare for every running
sequence.

Where cohorts are wanted, sequences that could begin with their adapter are held back for others
whose adapters are about to arrive, if that makes the sum of their waits shorter.

Else no sequence waits for another one's adapter, but for this: once a sequence has waited for a
slot longer than ``max_adapter_wait_s``, no later one is admitted with an unpinned adapter, so that
the slots fall idle and one of them becomes free. Sequences of the base model go on. Where adapters
rotate (see ``engine.rotation``), later ones may still join an adapter's turn.

With ``--adapter-loading blocking`` they do wait: see ``engine.step_wait``. A step that waits is
planned anew until it may go. What it has admitted by then runs, without having been in a step;
nothing is lost, as a sequence's progress counts from the launch alone.

With ``--adapter-loading layerwise`` a sequence that waits for its adapter alone goes through those
layers that have arrived, behind everything else in the step: see ``engine.layer_jobs``.
"""

from engine.cohorts import Cohorts
from engine.layer_jobs import LayerJobs
from engine.paused_sequences import PausedSequences
from engine.plan import ScheduledChunk
from engine.prefills import Prefills
from engine.residency import AdapterResidency
from engine.rotation import Rotation
from engine.running_sequences import RunningSequences
from engine.scheduler_stats import SchedulerStats
from engine.sequence import Sequence
from engine.step_turns import PrefillRoom
from engine.step_wait import StepWait
from engine.waiting_queue import WaitingQueue


class Admission:
    """Moves sequences from those that wait to those that run, with blocks and their adapter.

    ``cohorts`` None: nobody is held back for others; ``rotation`` None: adapters have no turns.
    Owned by the step thread.
    """

    def __init__(
        self,
        max_num_seqs: int,
        waiting: WaitingQueue,
        running: RunningSequences,
        paused: PausedSequences,
        residency: AdapterResidency,
        layer_jobs: LayerJobs,
        prefills: Prefills,
        step_wait: StepWait,
        stats: SchedulerStats,
        cohorts: Cohorts | None,
        rotation: Rotation | None,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._waiting = waiting
        self._running = running
        self._paused = paused
        self._residency = residency
        self._layer_jobs = layer_jobs
        self._prefills = prefills
        self._step_wait = step_wait
        self._stats = stats
        self._cohorts = cohorts
        self._rotation = rotation
        self._held_until_s: float | None = None

    @property
    def held_until_s(self) -> float | None:
        """Until when this step holds sequences back for a cohort; None if it does not."""
        return self._held_until_s

    def begin_step(self) -> None:
        """Nobody is held back yet."""
        self._held_until_s = None

    def admit(
        self,
        chunks: list[ScheduledChunk],
        room: PrefillRoom,
        overdue: Sequence | None,
        now_s: float,
    ) -> bool:
        """Adds waiting sequences; True if the step has to wait for the next one's adapter.

        ``chunks`` and a layer job get what they compute, as far as ``room`` allows. ``overdue``
        has waited too long for a slot.
        """
        if not self._may_admit(room) or not len(self._waiting):
            return False
        if self._cohorts is not None:
            self._held_until_s = self._cohorts.held_until_s(
                self._waiting, self._residency, len(self._running), now_s
            )
        is_held = self._held_until_s is not None
        self._stats.num_held_steps += is_held

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
            if not self._prefills.has_place(room, sequence):
                return False
            if not self._layer_jobs.has(sequence) and not self._admit_to_blocks(sequence):
                return False
            self._start_running(sequence, now_s)
            self._prefills.schedule(chunks, room, sequence)
            if not self._may_admit(room):
                return False
        if room.for_layers:
            self._layer_jobs.plan_waiting(
                self._waiting, may_begin, room.for_layers, room.longest, len(self._running)
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
        return not room.is_full and len(self._running) < self._max_num_seqs

    def _start_running(self, sequence: Sequence, now_s: float) -> None:
        self._waiting.remove(sequence)
        self._running.start(sequence, now_s)
        self._paused.went_on(sequence, now_s)
        if not sequence.num_preemptions and not sequence.num_pauses:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self._stats.num_prompt_tokens += sequence.num_prompt_tokens
            self._stats.num_cached_prompt_tokens += sequence.num_cached_tokens
