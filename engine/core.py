"""The step loop: where policy and compute meet, on a thread of its own.

A step is ``schedule → launch → wait → complete``. With a device that works by itself the thread
first launches step n+1, then waits for step n, so that the device never waits for the host:

| device runs | this thread meanwhile                                            |
|-------------|------------------------------------------------------------------|
| n           | …, schedules and launches n+1, waits for n                       |
| n+1         | completes and delivers n, carries out commands, schedules n+2, … |

Between launches, and while it waits, the thread carries out what other threads asked of it, so
that all policy state has one owner and needs no lock. Where it knows how long n+1 will take, it
schedules n+2 only shortly before the end: see ``engine.step_pacer``.

The life of a request here:

1. ``AddRequest`` makes it a waiting sequence. From this moment its adapter is in demand.
2. ``schedule`` admits it once its adapter lies in its slot and KV blocks are free. A step that
   waits for its adapters is an empty plan: the thread then waits for commands, of which the
   load's end is one.
3. Every step that draws a token for it adds one ``TokenDelta`` to what its client gets.
4. A finish reason, an error or ``CancelRequest`` ends it; its blocks and its use of the adapter
   are given back in the same step.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol, assert_never

from engine.action_dispatch import ActionDispatch, Slots
from engine.activity import RecentSteps, oldest_requests, pool_slots
from engine.block_manager import BlockManager
from engine.commands import (
    AddAdapter,
    AddRequest,
    CancelRequest,
    Command,
    DropClient,
    HostTierUpdated,
    LoadAbandoned,
    LoadBroken,
    LoaderConnected,
    LoaderLost,
    LoadPlaced,
    PrefetchAdapters,
    RemoveAdapter,
    Snapshot,
    StagesPlaced,
    TakeActivity,
    TakeSnapshot,
)
from engine.open_requests import OpenRequests
from engine.plan import LaunchedStep, StepPlan, nothing_between
from engine.residency import AdapterResidency
from engine.scheduler import Scheduler
from engine.step_meter import StepMeter
from engine.step_pacer import StepPacer
from ipc.activity import StepThreadActivity
from ipc.errors import SidestreamError, error_from_info
from ipc.messages import AdapterId, EngineToLoader, TokenDelta

# How long the thread sleeps at most when nothing can run. It bounds how late an expired wait is
# noticed, and costs nothing otherwise: a command wakes the thread at once.
IDLE_WAIT_S = 0.25
LEAST_WAIT_S = 0.0005
# How often it looks whether a step is done, while it listens for commands.
POLL_S = 0.0003


class Runner(Protocol):
    """The forward pass."""

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        """Gives the plan, which is not empty, to the device, behind all that were launched before.

        Waits for none of them. A launch that takes long calls ``between`` now and then, when it has
        taken from the plan's sequences what it needs.
        """
        ...


class _InFlight(NamedTuple):
    """Launched from ``launched_s`` to ``given_s``, in the host's time."""

    plan: StepPlan
    step: LaunchedStep
    launched_s: float
    given_s: float


class EngineCore:
    """Owns all policy state; other threads ask by command.

    With ``overlap_steps`` a step stays in flight while the next one is scheduled and launched.
    ``deliver`` takes one step's deltas by client, ``send_to_loader`` one message, and
    ``adapter_failed`` an adapter whose load went wrong; they are called on the step thread and
    must not block.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        residency: AdapterResidency,
        blocks: BlockManager,
        runner: Runner,
        slots: Slots,
        overlap_steps: bool,
        max_waiting: int,
        seed: int,
        deliver: Callable[[Mapping[bytes, list[TokenDelta]]], None],
        send_to_loader: Callable[[EngineToLoader], None],
        adapter_failed: Callable[[AdapterId, SidestreamError], None],
    ) -> None:
        self._scheduler = scheduler
        self._residency = residency
        self._blocks = blocks
        self._runner = runner
        self._overlap_steps = overlap_steps
        # In the order of their launches.
        self._in_flight: deque[_InFlight] = deque()
        # When the device was done with the last step that is complete.
        self._ended_s = 0.0
        self._pacer = StepPacer()
        self._is_running = False
        self._is_stopping = False
        self._deliver = deliver
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._requests = OpenRequests(scheduler, max_waiting, seed)
        self._dispatch = ActionDispatch(
            slots, blocks, self._requests, send_to_loader, adapter_failed
        )
        self._meter = StepMeter()
        self._recent_steps = RecentSteps()

    def submit(self, command: Command) -> None:
        """Takes a command, from any thread, without waiting."""
        self._commands.put(command)

    def stop(self) -> None:
        """Ends ``run`` after the steps in flight."""
        self._commands.put(None)

    def run(self) -> None:
        """The thread's body. What it raises is a broken invariant and ends the process."""
        self._is_running = True
        busy = False
        while not self._is_stopping:
            if busy:
                self._listen_until_launch()
            else:
                self._take_commands(self._idle_wait_s())
            if not self._is_stopping:
                busy = self.step(time.monotonic())
        self._complete_steps(num_left=0)
        self._flush()

    def step(self, now_s: float) -> bool:
        """One turn: launches a step, completes what is not to stay in flight, delivers.

        False if there was nothing to launch and nothing to complete.
        """
        if self._in_flight and self._scheduler.awaits_tokens:
            self._complete_steps(num_left=0)
        begin_s = time.monotonic()
        plan = self._scheduler.schedule(now_s)
        self._carry_out_actions()
        if not plan.is_empty:
            launched_s = time.monotonic()
            step = self._runner.launch(plan, partial(self._complete_meanwhile, plan))
            given_s = time.monotonic()
            self._in_flight.append(_InFlight(plan, step, launched_s, given_s))
            self._scheduler.launched(plan)
            self._pacer.launch_took(plan, time.monotonic() - begin_s)
        busy = bool(self._in_flight)
        # With nothing new to run, only what is in flight can lead to something.
        self._complete_steps(num_left=1 if self._overlap_steps and not plan.is_empty else 0)
        self._flush()
        return busy

    def _complete_steps(self, num_left: int) -> None:
        """Waits for the oldest steps, until ``num_left`` are in flight."""
        while len(self._in_flight) > num_left:
            self._listen_until_done(self._in_flight[0].step)
            self._complete_oldest()

    def _complete_meanwhile(self, plan: StepPlan) -> None:
        """While ``plan`` is being launched: steps that are done do not wait for the launch's end.

        Only where none of their tokens can end a sequence of the plan.
        """
        while self._in_flight and not plan.has_pending and self._in_flight[0].step.is_done():
            self._complete_oldest()
            self._flush()

    def _complete_oldest(self) -> None:
        plan, step, launched_s, _ = self._in_flight.popleft()
        sampled = step.wait()
        # The end itself may have been seen late: the thread was busy with the next launch.
        seconds = step.device_s()
        begin_s = max(launched_s, self._ended_s)
        self._ended_s = min(begin_s + seconds, time.monotonic())
        self._pacer.step_took(plan, seconds)
        residency = self._residency
        self._meter.completed(plan, seconds, residency.is_any_loading, residency.last_load)
        self._recent_steps.completed(plan, begin_s, self._ended_s)
        if self._in_flight and self._in_flight[0].plan.is_decode:
            self._pacer.was_given(self._in_flight[0].given_s - self._ended_s)
        if plan.layer_group is None:
            # A group of layers is no measure: it does not read all weights.
            self._scheduler.step_took(plan.num_tokens, seconds)
        for progress in self._scheduler.complete(plan, sampled):
            self._requests.report(progress)

    # --- Commands ---------------------------------------------------------------------------

    def _take_commands(self, timeout_s: float) -> bool:
        """Carries out what is in the queue, at first waiting for something; whether there was."""
        num_taken = 0
        while not self._is_stopping:
            try:
                command = self._commands.get(block=timeout_s > 0, timeout=timeout_s or None)
            except Empty:
                break
            if command is None:
                self._is_stopping = True
            else:
                self.carry_out(command)
            num_taken += 1
            timeout_s = 0.0
        return num_taken > 0

    def _listen_until_launch(self) -> None:
        """Carries out commands until the next step is to be launched; what loads can, begin."""
        self._take_commands(0.0)
        if len(self._in_flight) != 1:
            return
        plan, step, launched_s, _ = self._in_flight[0]
        if plan.layer_group is not None and not self._scheduler.awaits_layers:
            # What the next group has is known.
            return
        due_s = self._pacer.next_launch_s(plan, max(launched_s, self._ended_s))
        while due_s is not None and not self._is_stopping and not step.is_done():
            left_s = due_s - time.monotonic()
            if left_s <= 0:
                return
            if self._take_commands(min(left_s, POLL_S)):
                self._begin_loads(step)

    def _listen_until_done(self, step: LaunchedStep) -> None:
        """The same until the step is done, unless its end is near."""
        while self._is_running and not self._is_stopping and not step.is_done():
            if self._take_commands(POLL_S):
                self._begin_loads(step)

    def _begin_loads(self, step: LaunchedStep) -> None:
        """A load need not wait for a step to be scheduled.

        Yet the tokens of ``step``, which is in flight, do not wait for loads to begin: what is to
        be done for these is then left to the next turn.
        """
        self._scheduler.meet_demand(time.monotonic())
        if not step.is_done():
            self._carry_out_actions()

    def _idle_wait_s(self) -> float:
        """How long nothing but a command can bring something to run."""
        held_until_s = self._scheduler.held_until_s
        if held_until_s is None:
            return IDLE_WAIT_S
        return min(IDLE_WAIT_S, max(LEAST_WAIT_S, held_until_s - time.monotonic()))

    def carry_out(self, command: Command) -> None:
        """Does what another thread asked for."""
        match command:
            case AddRequest():
                self._requests.add(command)
            case CancelRequest(client, request_id):
                self._requests.cancel(client, request_id)
            case DropClient(client):
                self._requests.drop_client(client)
            case AddAdapter():
                self._add_adapter(command)
            case RemoveAdapter(adapter_id):
                self._residency.remove(adapter_id)
            case PrefetchAdapters(adapter_ids):
                self._residency.prefetch(adapter_ids)
            case LoaderConnected():
                self._residency.loader_connected()
            case LoaderLost():
                self._residency.loader_lost()
            case HostTierUpdated(added, removed):
                self._residency.hits.host_tier_changed(added, removed)
            case StagesPlaced(load_id, num_stages):
                self._residency.stages_placed(load_id, num_stages)
            case LoadPlaced(load_id, place_s):
                self._residency.load_placed(load_id, time.monotonic(), place_s)
            case LoadBroken(load_id, error):
                self._residency.load_failed(load_id, error_from_info(error))
            case LoadAbandoned(load_id):
                self._residency.load_abandoned(load_id)
            case TakeSnapshot(answer):
                answer(self._snapshot())
            case TakeActivity(answer):
                answer(self._activity(time.monotonic()))
            case _:
                assert_never(command)

    def _add_adapter(self, command: AddAdapter) -> None:
        try:
            self._residency.add(
                command.adapter_id, command.manifest, command.pinned, command.replaces
            )
        except SidestreamError as error:
            command.answer(error.info)
        else:
            command.answer(None)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_waiting_for_adapter=self._scheduler.num_waiting_for_adapter,
            kv_blocks_used=self._blocks.num_used,
            scheduler=replace(self._scheduler.stats),
            num_paused=self._scheduler.num_paused,
            rotation=replace(self._scheduler.rotation_stats),
            step_waits=replace(self._scheduler.step_waits),
            layer_jobs=replace(self._scheduler.layer_jobs),
            adapters_resident=self._residency.num_resident,
            pool_bytes_used=self._residency.pool_bytes_used,
            steps=self._meter.stats(),
            loads=self._residency.stats.counts(),
            hits=self._residency.hits.counts(),
            tiers=self._residency.tiers(),
        )

    def _activity(self, now_s: float) -> StepThreadActivity:
        residency, scheduler = self._residency, self._scheduler
        return StepThreadActivity(
            slots=pool_slots(
                residency.pooled_adapters,
                residency.num_layers,
                residency.hits.is_in_host_tier,
                now_s,
            ),
            loads=residency.recent_loads.timeline(now_s),
            requests=oldest_requests(self._requests.sequences, now_s),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            generation_tokens_total=scheduler.stats.num_generated_tokens,
            steps=self._recent_steps.timeline(now_s),
        )

    # --- What a step leads to ---------------------------------------------------------------

    def _carry_out_actions(self) -> None:
        """Tells placer, pool and loader what residency has decided."""
        for action in self._residency.take_actions():
            self._dispatch.carry_out(action)

    def _flush(self) -> None:
        """Hands over what clients got since the last step."""
        deltas = self._requests.take_deltas()
        if deltas:
            self._deliver(deltas)
