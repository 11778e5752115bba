"""A simulated machine under the real policy: a loader that is slow, fails and dies, a placer, a
device that runs late, a pool and a KV cache that remember what was written where, clients that
come and go, and a clock.

The pool and the cache hold stamps in place of tensors, so that "another adapter's weights" and
"another prompt's keys" are found the moment a step would read them.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from engine.adapter_actions import (
    AbandonLoad,
    BeginLoad,
    FailRequests,
    InstallAdapter,
    RemoveAdapter,
)
from engine.config import AdapterLoading
from engine.plan import LaunchedStep, LayerGroup, StepPlan
from engine.sequence import Sequence, SequenceState
from ipc.errors import AdapterInvalid, Overloaded
from ipc.image import ImageLayout
from ipc.messages import AdapterId, Forget, LoadId, Residency, SamplingParams, Warm
from tests.engine.builders import BASE, Policy, make_manifest, make_sequence
from tests.engine.late_device import LateDevice, answer

WAIT_LIMIT_S = 0.5
LOAD_TIMEOUT_S = 4.0
POOL_BYTES = 40 * 1024
NUM_BLOCKS = 16
BLOCK_SIZE = 4
MAX_SEQUENCE_TOKENS = 48
MAX_TOKENS_IN_STEP = 24
RANKS = (8, 16, 24, 32)
WAITING_STATES = (SequenceState.WAITING, SequenceState.PAUSED)
MODULES = (("q_proj",), ("v_proj",), ("q_proj", "v_proj"))


@dataclass(eq=False)
class SimulatedLoad:
    """Writes only once the first ``fence`` steps are done: all that were launched before it, or
    none if it need not follow them.

    ``num_placed`` of the pieces, one for each layer, were reported to be in place.
    """

    adapter_id: AdapterId
    pieces: list[tuple[int, int]]
    fence: int
    ends_s: float
    fails: bool
    abandoned: bool = False
    num_placed: int = 0


class Simulation:
    """One engine's life; ``tick`` is one turn of the step loop, with all that may happen in it.

    With ``overlap`` a step stays in flight from one turn to the next; with ``cohorts`` prefills may
    be held back for others; with ``rotation`` sequences may be paused; with ``launches_apart``
    decodes and prefills take turns.
    """

    def __init__(
        self,
        rng: random.Random,
        overlap: bool,
        adapter_loading: AdapterLoading = AdapterLoading.OVERLAP,
        cohorts: bool = False,
        rotation: bool = False,
        launches_apart: bool = False,
    ) -> None:
        self.rng = rng
        self.overlap = overlap
        self.adapter_loading = adapter_loading
        self.launches_apart = launches_apart
        self.most_between_decodes = rng.choice((MAX_TOKENS_IN_STEP, 4, 9))
        self.num_between_decodes = 0
        self.device = LateDevice(BLOCK_SIZE, self._see_adapter)
        self.in_flight: deque[tuple[StepPlan, LaunchedStep]] = deque()
        self.num_overlapped = 0
        self.num_groups = 0
        self.policy = Policy(
            pool_bytes=POOL_BYTES,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_seqs=6,
            max_num_batched_tokens=MAX_TOKENS_IN_STEP,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
            max_adapter_wait_s=WAIT_LIMIT_S,
            load_timeout_s=LOAD_TIMEOUT_S,
            cohorts=cohorts,
            rotation=rotation,
            chunked_prefill_size=self.most_between_decodes if launches_apart else None,
            launches_apart=launches_apart,
            adapter_loading=adapter_loading,
        )
        self.now_s = 0.0
        self.sequences: list[Sequence] = []
        self.num_answers: dict[Sequence, int] = {}
        self.registered: list[AdapterId] = []
        self.forgotten: list[AdapterId] = []
        self.num_adapters = 0
        self.loader_is_there = False
        self.loads: dict[LoadId, SimulatedLoad] = {}
        self.extents: dict[AdapterId, list[tuple[int, int]]] = {}
        # Whose bytes stand at each extent; None: what a load under way has left there.
        self.stamps: dict[int, AdapterId | None] = {}
        self.table: dict[AdapterId, list[tuple[int, int]]] = {}
        self.starving_since_s: dict[AdapterId, float] = {}

    # --- What others do --------------------------------------------------------------------

    def register(self, pinned: bool) -> None:
        self.num_adapters += 1
        adapter_id = AdapterId(self.num_adapters)
        manifest = make_manifest(adapter_id, self.rng.choice(RANKS), self.rng.choice(MODULES))
        try:
            self.policy.residency.add(adapter_id, manifest, pinned)
        except (Overloaded, AdapterInvalid):
            return
        self.registered.append(adapter_id)

    def unregister(self) -> None:
        adapter_id = self.registered.pop(self.rng.randrange(len(self.registered)))
        self.policy.residency.remove(adapter_id)

    def repin(self) -> None:
        adapter_id = self.rng.choice(self.registered)
        try:
            self.policy.residency.set_pinned(adapter_id, self.rng.random() < 0.3)
        except Overloaded:
            return

    def prefetch(self) -> None:
        self.policy.residency.prefetch(self.rng.choices(self.registered, k=3))

    def request(self) -> None:
        adapter_id = None
        if self.registered and self.rng.random() < 0.8:
            # Popularity is skewed, so that there are hot adapters and starving ones.
            adapter_id = self.registered[int(self.rng.random() ** 2 * len(self.registered))]
        shared = [7] * self.rng.choice((0, 4, 9))
        prompt = shared + [self.rng.randrange(1, 4) for _ in range(self.rng.randint(1, 24))]
        sequence = make_sequence(
            len(self.sequences),
            prompt,
            adapter_id,
            max_tokens=self.rng.randint(1, 20),
            arrival_s=self.now_s,
            sampling=SamplingParams(
                ignore_eos=self.rng.random() < 0.5,
                min_tokens=self.rng.choice((0, 0, 3)),
                presence_penalty=self.rng.choice((0.0,) * 9 + (0.5,)),
            ),
        )
        self.sequences.append(sequence)
        self.num_answers[sequence] = 0
        self.policy.scheduler.add(sequence)

    def cancel(self) -> None:
        living = [s for s in self.sequences if s.state is not SequenceState.FINISHED]
        if living:
            sequence = self.rng.choice(living)
            self.policy.scheduler.abort(sequence)
            self._answered(sequence)

    def start_loader(self) -> None:
        self.loader_is_there = True
        self.policy.residency.loader_connected()

    def kill_loader(self) -> None:
        self.loader_is_there = False
        self.policy.residency.loader_lost()

    def progress_loads(self) -> None:
        for load_id, load in list(self.loads.items()):
            if load.ends_s > self.now_s:
                self._progress(load_id, load)
                continue
            if load.abandoned:
                # A copy that was under way ends: the last moment at which the slot is written.
                self._write(load.pieces[load.num_placed :], None, load.fence)
                del self.loads[load_id]
                del self.extents[load.adapter_id]
                self.policy.residency.load_abandoned(load_id)
            elif self.loader_is_there and load.fails:
                load.ends_s = float("inf")
                self.policy.residency.load_failed(load_id, AdapterInvalid("a file has changed"))
            elif self.loader_is_there:
                self._write(load.pieces, load.adapter_id, load.fence)
                load.ends_s = float("inf")
                self.policy.residency.load_placed(load_id, self.now_s)
                # One that was given up meanwhile is still to be abandoned.
                if self.policy.residency.is_resident(load.adapter_id):
                    del self.loads[load_id]

    def _progress(self, load_id: LoadId, load: SimulatedLoad) -> None:
        """Places some layers of the load, but never the last, and reports them where that is done.

        A loader that is dead, or a load that was given up, brings no more.
        """
        is_over = load.abandoned or load.ends_s == float("inf") or not self.loader_is_there
        if is_over or self.adapter_loading is not AdapterLoading.LAYERWISE:
            return
        num_placed = self.rng.choice((0, 0, 1, 2))
        if num_placed > load.num_placed:
            self._write(load.pieces[:num_placed], load.adapter_id, load.fence)
            load.num_placed = num_placed
            self.policy.residency.stages_placed(load_id, BASE.layer_stage(num_placed))

    # --- The step loop -----------------------------------------------------------------------

    def tick(self, cancels_while_running: bool = False) -> None:
        policy = self.policy
        self.now_s += self.rng.choice((0.001, 0.01, 0.05, 0.2))
        self.progress_loads()
        if policy.scheduler.awaits_tokens:
            self._complete_steps(num_left=0)
        running_before = {s for s in self.sequences if s.state is SequenceState.RUNNING}
        open_before = self._open_turns()
        could_decode = {s: s.num_pauses for s in running_before if _could_decode(s)}
        plan = policy.scheduler.schedule(self.now_s)
        self._carry_out_actions()
        self._check_bounded_waiting(plan, running_before, open_before)
        self._check_pauses(running_before)
        self._check_plan(plan)
        if self.launches_apart:
            self._check_turn(plan, could_decode)
        self._check_step_wait(plan)
        if plan.layer_group is not None:
            self._check_layer_group(plan.layer_group)
        if not plan.is_empty:
            self.num_overlapped += bool(self.in_flight)
            self.in_flight.append((plan, self.device.launch(plan)))
            policy.scheduler.launched(plan)
            if plan.layer_group is None:
                policy.scheduler.step_took(plan.num_tokens, self.rng.uniform(0.02, 0.04))
        if cancels_while_running:
            self.cancel()
        self._complete_steps(num_left=1 if self.overlap and not plan.is_empty else 0)
        policy.slots.assert_consistent()
        policy.blocks.assert_consistent()

    def drain(self) -> None:
        """Everything ends within a bounded number of turns once nothing goes wrong any more."""
        for load in self.loads.values():
            load.fails = False
        if not self.loader_is_there:
            self.start_loader()
        for _ in range(3000):
            if all(s.state is SequenceState.FINISHED for s in self.sequences):
                break
            self.tick()
        assert all(count == 1 for count in self.num_answers.values())
        for sequence in self.sequences:
            self._check_answer(sequence)
        policy = self.policy
        policy.scheduler.assert_idle()
        while self.registered:
            self.unregister()
        for _ in range(100):
            self.tick()
        assert not self.loads and not self.extents and not self.table
        assert policy.pool.used_bytes == 0
        assert len(set(self.forgotten)) == len(self.forgotten)
        assert policy.residency.num_resident == 0

    def _complete_steps(self, num_left: int) -> None:
        while len(self.in_flight) > num_left:
            plan, step = self.in_flight.popleft()
            for progress in self.policy.scheduler.complete(plan, step.wait()):
                sequence = progress.sequence
                assert sequence.token_ids[-1] == progress.sampled.token_id
                assert sequence.finish_reason is progress.finish_reason
                if progress.finish_reason is not None:
                    self._answered(sequence)

    def _carry_out_actions(self) -> None:
        for action in self.policy.residency.take_actions():
            match action:
                case BeginLoad():
                    self._begin(action)
                case AbandonLoad(load_id):
                    load = self.loads[load_id]
                    assert not load.abandoned
                    load.abandoned = True
                    load.ends_s = self.now_s + self.rng.choice((0.0, 0.3))
                case InstallAdapter(adapter_id, _, layout, extents):
                    assert adapter_id not in self.table
                    self.table[adapter_id] = _pieces(extents, layout)
                    assert self.table[adapter_id] == self.extents[adapter_id]
                case RemoveAdapter(adapter_id):
                    del self.table[adapter_id]
                    # Of a load that is given up the slot stays until the placer has let go of it.
                    if all(load.adapter_id != adapter_id for load in self.loads.values()):
                        del self.extents[adapter_id]
                case FailRequests(adapter_id, error):
                    assert str(error)
                    for sequence in self.policy.scheduler.fail_adapter(adapter_id):
                        self._answered(sequence)
                case Warm(sources):
                    assert self.loader_is_there
                    assert len({source.path for source in sources}) == len(sources)
                case Forget(adapter_id):
                    assert adapter_id not in self.table
                    self.forgotten.append(adapter_id)
                    self.policy.blocks.forget_adapter(adapter_id)
                case _:
                    assert_never(action)

    def _begin(self, action: BeginLoad) -> None:
        assert self.loader_is_there
        pieces = _pieces(action.extents, action.layout)
        for start, end in pieces:
            assert 0 <= start < end <= POOL_BYTES and start % 128 == 0
            for owned in self.extents.values():
                assert all(end <= s or e <= start for s, e in owned), "two slots overlap"
        assert action.adapter_id not in self.extents
        self.extents[action.adapter_id] = pieces
        load = SimulatedLoad(
            action.adapter_id,
            pieces,
            self.device.num_launched if action.follows_steps else 0,
            self.now_s + self.rng.choice((0.0, 0.02, 0.3, 1.0, 6.0)),
            fails=self.rng.random() < 0.1,
        )
        self.loads[action.load_id] = load
        self._write(pieces, None, load.fence)

    def _write(self, pieces: list[tuple[int, int]], stamp: AdapterId | None, fence: int) -> None:
        self.device.run_up_to(fence)
        self.stamps.update((start, stamp) for start, _ in pieces)

    # --- Invariants ----------------------------------------------------------------------------

    def _check_plan(self, plan: StepPlan) -> None:
        scheduled = [chunk.sequence for chunk in plan.chunks]
        assert len(set(scheduled)) == len(scheduled)
        group = plan.layer_group
        if group is None or len(group.layers) > 1:
            assert plan.num_tokens <= MAX_TOKENS_IN_STEP
        assert self.policy.scheduler.num_running <= 6
        holders: dict[int, int] = {}
        for sequence in self.sequences:
            for block in sequence.block_table:
                holders[block] = holders.get(block, 0) + 1
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.state is SequenceState.RUNNING
            assert chunk.num_tokens > 0
            end = chunk.start + chunk.num_tokens
            assert chunk.samples == (end == sequence.num_tokens)
            assert sequence.num_drawn_tokens < sequence.max_tokens
            assert not (sequence.has_penalty and chunk.pending_from is not None)
            for block in sequence.block_table[chunk.start // BLOCK_SIZE : -(-end // BLOCK_SIZE)]:
                assert holders[block] == 1, "a step writes into a block that others read"

    def _check_turn(self, plan: StepPlan, pauses_before: dict[Sequence, int]) -> None:
        """A step has decodes or prefills; those wait for a bounded number of tokens of these.

        ``pauses_before`` has those that could decode. Who was paused now may be admitted again, and
        is among the prefills then.
        """
        could_decode = {
            sequence
            for sequence, num_pauses in pauses_before.items()
            if sequence.state is SequenceState.RUNNING and sequence.num_pauses == num_pauses
        }
        scheduled = {chunk.sequence for chunk in plan.chunks}
        if scheduled & could_decode:
            assert plan.is_decode
            self.num_between_decodes = 0
            return
        assert not could_decode or self.num_between_decodes < self.most_between_decodes
        self.num_between_decodes += plan.num_tokens

    def _check_step_wait(self, plan: StepPlan) -> None:
        """Whoever runs is in a step, unless that step waits for a load that is under way."""
        scheduler = self.policy.scheduler
        if not plan.is_empty or self.in_flight or not scheduler.num_running:
            return
        waiting = [s for s in self.sequences if s.state in WAITING_STATES]
        assert self.adapter_loading is AdapterLoading.BLOCKING
        assert any(
            sequence.adapter_id is not None
            and self.policy.residency.tier(sequence.adapter_id) is Residency.LOADING
            for sequence in waiting
        ), "a step waits although nobody's adapter is being loaded"

    def _check_layer_group(self, group: LayerGroup) -> None:
        """Of one sequence whose adapter lies in its slot that far, and that holds all its blocks.

        While it waits for its adapter nobody waits for it in turn: it is no step's only reason to
        be held up, and its blocks are nobody else's.
        """
        self.num_groups += 1
        chunk = group.chunk
        sequence = chunk.sequence
        adapter_id = sequence.adapter_id
        assert chunk.num_tokens <= MAX_TOKENS_IN_STEP
        assert sequence.num_computed_tokens == chunk.start
        assert len(sequence.block_table) == -(-len(sequence.token_ids) // BLOCK_SIZE)
        loads = [x for x in self.loads.values() if x.adapter_id == adapter_id and not x.abandoned]
        if adapter_id is None or self.policy.residency.is_resident(adapter_id):
            assert sequence.state is SequenceState.RUNNING
        else:
            assert sequence.state is SequenceState.WAITING
            assert [group.layers.stop <= load.num_placed for load in loads] == [True]

    def _see_adapter(self, adapter_id: AdapterId, layers: range) -> Callable[[], None]:
        pieces = self.table[adapter_id][layers.start : layers.stop]

        def read() -> None:
            assert all(self.stamps[start] == adapter_id for start, _ in pieces), "another adapter"

        return read

    def _check_answer(self, sequence: Sequence) -> None:
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        expected, reason = answer(sequence, MAX_SEQUENCE_TOKENS)
        if sequence.finish_reason is None:
            assert output == expected[: len(output)]
        else:
            assert (output, sequence.finish_reason) == (expected, reason)

    def _open_turns(self) -> set[AdapterId]:
        """Adapters that have a turn which anybody may still join."""
        rotation = self.policy.rotation
        if rotation is None:
            return set()
        return {i for i in self.table if rotation.may_join(i, self.now_s)}

    def _check_pauses(self, running_before: set[Sequence]) -> None:
        """Paused ones keep their KV; nobody is paused who has no slot that others could get."""
        paused = [s for s in self.sequences if s.state is SequenceState.PAUSED]
        for sequence in paused:
            held = len(sequence.block_table) * BLOCK_SIZE
            assert 0 < sequence.num_computed_tokens <= held
        for sequence in running_before.intersection(paused):
            assert sequence.adapter_id in self.registered
            assert not self.policy.residency.is_pinned(sequence.adapter_id)

    def _check_bounded_waiting(
        self, plan: StepPlan, running_before: set[Sequence], open_before: set[AdapterId]
    ) -> None:
        residency = self.policy.residency
        first: dict[AdapterId, Sequence] = {}
        for sequence in sorted(self.sequences, key=lambda each: each.place):
            if sequence.adapter_id is not None and sequence.state in WAITING_STATES:
                first.setdefault(sequence.adapter_id, sequence)
        in_load = {load.adapter_id for load in self.loads.values()}
        starving = {
            adapter_id: self.starving_since_s.get(adapter_id, self.now_s)
            for adapter_id in first
            if self.loader_is_there
            and adapter_id not in in_load
            and residency.tier(adapter_id) is Residency.DISK
        }
        self.starving_since_s = starving
        admitted = [
            chunk.sequence
            for chunk in plan.completed_chunks
            if chunk.sequence not in running_before and chunk.sequence.adapter_id is not None
        ]
        for adapter_id, since_s in starving.items():
            waiting = first[adapter_id]
            if self.now_s - max(since_s, waiting.arrival_s) <= WAIT_LIMIT_S:
                continue
            may_join = open_before.union(
                s.adapter_id for s in admitted if s.place < waiting.place if s.adapter_id
            )
            for sequence in admitted:
                assert sequence.adapter_id is not None
                assert (
                    sequence.place < waiting.place
                    or residency.is_pinned(sequence.adapter_id)
                    or (self.policy.rotation is not None and sequence.adapter_id in may_join)
                ), "a later sequence overtook one that has waited too long for a slot"

    def _answered(self, sequence: Sequence) -> None:
        self.num_answers[sequence] += 1
        assert sequence.state is SequenceState.FINISHED
        assert not sequence.block_table


def _pieces(extents: tuple[int, ...], layout: ImageLayout) -> list[tuple[int, int]]:
    """``(start, end)`` of every stage that has bytes."""
    sizes = layout.stage_bytes
    return [(start, start + size) for start, size in zip(extents, sizes, strict=True) if size]


def _could_decode(sequence: Sequence) -> bool:
    """Whether it has one token to compute, and may have another behind it."""
    num_tokens = sequence.num_tokens
    if num_tokens - sequence.num_computed_tokens != 1:
        return False
    left = min(sequence.max_tokens - sequence.num_drawn_tokens, MAX_SEQUENCE_TOKENS - num_tokens)
    return not sequence.num_pending_tokens or left > 0
