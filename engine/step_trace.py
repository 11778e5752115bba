"""Records what steps and slots do, from around them: the step loop itself knows of no trace."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Protocol

from engine.action_dispatch import Slots
from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.core import Runner
from engine.plan import LaunchedStep, LayerGroup, SampledToken, StepPlan, nothing_between
from engine.trace_tracks import (
    FORWARD_GROUP_TRACK,
    FORWARD_TRACK,
    STEP_GROUP_TRACK,
    STEP_TRACK,
)
from ipc.messages import AdapterId, LoadId
from ipc.trace import Args, Flow, Recorder


class TimedEvent(Protocol):
    """A point in the forward stream's work, and when it was reached."""

    def query(self) -> bool: ...

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this event to ``end``; both are done."""
        ...


class LoadNames:
    """Which load brings which adapter; an adapter is called as its folder is."""

    def __init__(self) -> None:
        self._first_uses: dict[AdapterId, tuple[LoadId, str]] = {}
        self._loads: dict[LoadId, str] = {}
        self._adapters: dict[AdapterId, str] = {}

    def begin(self, load: BeginLoad) -> None:
        name = PurePath(load.source.path).name
        self._loads[load.load_id] = name
        self._adapters[load.adapter_id] = name
        self._first_uses[load.adapter_id] = (load.load_id, name)

    def forget(self, adapter_id: AdapterId) -> None:
        """No step to come uses the adapter."""
        self._first_uses.pop(adapter_id, None)
        self._adapters.pop(adapter_id, None)

    def end(self, load_id: LoadId) -> None:
        self._loads.pop(load_id, None)

    def name(self, load_id: LoadId) -> str:
        """The adapter's name, empty if it has left the pool or the load was given up."""
        return self._loads.get(load_id, "")

    def adapter_name(self, adapter_id: AdapterId | None) -> str:
        """The adapter's name, empty if it is not in the pool."""
        return "" if adapter_id is None else self._adapters.get(adapter_id, "")

    def first_uses(self, plan: StepPlan) -> list[tuple[LoadId, str]]:
        """The loads whose adapter no step before ``plan`` has used; each is told once."""
        if not self._first_uses:
            return []
        adapter_ids = {chunk.sequence.adapter_id for chunk in plan.chunks}
        if plan.layer_group is not None:
            adapter_ids.add(plan.layer_group.chunk.sequence.adapter_id)
        return [
            self._first_uses.pop(adapter_id)
            for adapter_id in adapter_ids
            if adapter_id is not None and adapter_id in self._first_uses
        ]


class TracedSlots:
    """``slots``, and in ``names`` the loads that begin and end."""

    def __init__(self, slots: Slots, names: LoadNames) -> None:
        self._slots = slots
        self._names = names
        self._loads: dict[AdapterId, LoadId] = {}

    def begin(self, load: BeginLoad) -> None:
        self._names.begin(load)
        self._loads[load.adapter_id] = load.load_id
        self._slots.begin(load)

    def abandon(self, load_id: LoadId) -> None:
        self._names.end(load_id)
        self._slots.abandon(load_id)

    def install(self, adapter: InstallAdapter) -> None:
        # Chunks of its load may still come: some of its layers are enough to be installed.
        self._slots.install(adapter)

    def remove(self, adapter_id: AdapterId) -> None:
        self._names.end(self._loads.pop(adapter_id))
        self._names.forget(adapter_id)
        self._slots.remove(adapter_id)


@dataclass(frozen=True, slots=True)
class _Marks:
    """The ends of a step, or of a part, and the host's times between which both were reached."""

    track: str
    name: str
    begin: TimedEvent
    end: TimedEvent
    launched_s: float
    args: Args


class DeviceTimes:
    """Turns timed events into host times, without waiting for any of them.

    The two clocks are laid over each other by what is certain: no step begins before its launch,
    and none ends after it was seen to be done.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._marks: deque[_Marks] = deque()
        self._last: tuple[TimedEvent, float] | None = None

    def add_step(self, begin: TimedEvent, end: TimedEvent, launched_s: float, args: Args) -> None:
        self._marks.append(_Marks(FORWARD_TRACK, "step", begin, end, launched_s, args))

    def add_group(self, begin: TimedEvent, end: TimedEvent, launched_s: float, args: Args) -> None:
        """To be called before ``add_step`` of its step."""
        self._marks.append(_Marks(FORWARD_GROUP_TRACK, "layers", begin, end, launched_s, args))

    def record_done(self) -> None:
        """Records every step whose end was reached."""
        while self._marks and self._marks[0].end.query():
            marks, seen_s = self._marks.popleft(), time.monotonic()
            begin_s = marks.launched_s
            if self._last is not None:
                last, last_s = self._last
                begin_s = max(begin_s, last_s + last.elapsed_time(marks.begin) / 1000)
            end_s = begin_s + marks.begin.elapsed_time(marks.end) / 1000
            late_s = max(0.0, end_s - seen_s)
            if self._last is not None:
                # A step before it is recorded already, and two never run at once.
                late_s = min(late_s, max(0.0, begin_s - self._last[1]))
            self._last = (marks.end, end_s - late_s)
            begin_s, end_s = begin_s - late_s, end_s - late_s
            self._recorder.span(marks.track, marks.name, begin_s, end_s, marks.args)


class TracedGroups:
    """Records launches of layer groups, each within its step's; on the step thread alone.

    ``mark`` records a timed event on the forward stream. None: a group is done when its launch
    returns, as on a CPU.
    """

    def __init__(
        self,
        names: LoadNames,
        recorder: Recorder,
        mark: Callable[[], TimedEvent] | None,
    ) -> None:
        self.device_times = DeviceTimes(recorder)
        self._names = names
        self._recorder = recorder
        self._mark = mark

    @contextmanager
    def around(self, group: LayerGroup) -> Iterator[None]:
        """To be entered for the time of a group's launch."""
        args: Args = {
            "adapter": self._names.adapter_name(group.chunk.sequence.adapter_id),
            "layers": f"{group.layers.start}-{group.layers.stop - 1}",
            "tokens": group.chunk.num_tokens,
        }
        begin_s = time.monotonic()
        begin = self._mark() if self._mark is not None else None
        yield
        end_s = time.monotonic()
        self._recorder.span(STEP_GROUP_TRACK, "launch layers", begin_s, end_s, args)
        if self._mark is None or begin is None:
            self._recorder.span(FORWARD_GROUP_TRACK, "layers", begin_s, end_s, args)
        else:
            self.device_times.add_group(begin, self._mark(), begin_s, args)


class TracedRunner:
    """``runner``, its launches and waits recorded; used on the step thread alone.

    ``mark`` records a timed event on the forward stream. None: a step is done when its launch
    returns, as on a CPU. ``device_times`` is that of the groups within the runner's steps.
    """

    def __init__(
        self,
        runner: Runner,
        names: LoadNames,
        recorder: Recorder,
        mark: Callable[[], TimedEvent] | None,
        device_times: DeviceTimes,
    ) -> None:
        self._runner = runner
        self._names = names
        self._recorder = recorder
        self._mark = mark
        self._device_times = device_times
        self._num_launched = 0

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        first_uses = self._names.first_uses(plan)
        self._num_launched += 1
        args = _describe(plan, self._num_launched, [name for _, name in first_uses])
        begin_s = time.monotonic()
        begin = self._mark() if self._mark is not None else None
        step = self._runner.launch(plan, between)
        end_s = time.monotonic()
        self._recorder.span(STEP_TRACK, "launch", begin_s, end_s, args)
        for load_id, _ in first_uses:
            self._recorder.flow(STEP_TRACK, "load", load_id, Flow.END, begin_s)
        if self._mark is None or begin is None:
            self._recorder.span(FORWARD_TRACK, "step", begin_s, end_s, args)
        else:
            self._device_times.add_step(begin, self._mark(), begin_s, args)
        return _TracedStep(step, self._num_launched, self._recorder, self._device_times)


class _TracedStep:
    def __init__(
        self, step: LaunchedStep, number: int, recorder: Recorder, device_times: DeviceTimes
    ) -> None:
        self._step = step
        self._number = number
        self._recorder = recorder
        self._device_times = device_times

    def is_done(self) -> bool:
        return self._step.is_done()

    def device_s(self) -> float:
        return self._step.device_s()

    def wait(self) -> list[SampledToken]:
        begin_s = time.monotonic()
        sampled = self._step.wait()
        end_s = time.monotonic()
        self._recorder.span(STEP_TRACK, "wait", begin_s, end_s, {"step": self._number})
        # Its own end is marked behind what was waited for: often the next wait finds it.
        self._device_times.record_done()
        return sampled


def _describe(plan: StepPlan, number: int, first_uses: list[str]) -> Args:
    num_decode = sum(chunk.start >= chunk.sequence.num_prompt_tokens for chunk in plan.chunks)
    kind = "mixed" if num_decode else "prefill"
    if num_decode == len(plan.chunks):
        kind = "decode" if num_decode else "layers"
    return {
        "step": number,
        "tokens": plan.num_tokens,
        "sequences": len(plan.chunks),
        "kind": kind,
        "first_uses": ", ".join(sorted(first_uses)),
    }
