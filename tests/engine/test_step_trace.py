"""Steps are recorded as they ran, and each load's first use once."""

import math
from collections.abc import Callable
from itertools import pairwise

from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.plan import (
    LaunchedStep,
    LayerGroup,
    SampledToken,
    ScheduledChunk,
    StepPlan,
    nothing_between,
)
from engine.step_trace import DeviceTimes, LoadNames, TracedGroups, TracedRunner, TracedSlots
from ipc.image import layout_image
from ipc.messages import AdapterId, AdapterSource, LoadId
from ipc.trace import Flow
from tests.engine.builders import BASE, make_manifest, make_sequence
from tests.trace_events import ListRecorder


class InstantStep:
    def is_done(self) -> bool:
        return True

    def device_s(self) -> float:
        return 0.0

    def wait(self) -> list[SampledToken]:
        return []


class InstantRunner:
    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        return InstantStep()


class Reached:
    """A point that a device reaches at ``at_ms`` of its own clock."""

    def __init__(self, at_ms: float, done: bool = True) -> None:
        self.at_ms = at_ms
        self.done = done

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, end: "Reached", /) -> float:
        return end.at_ms - self.at_ms


def begin_load(load_id: int, adapter_id: int) -> BeginLoad:
    manifest = make_manifest(adapter_id)
    source = AdapterSource("/adapters/shout", manifest.generation)
    layout = layout_image(BASE, manifest.modules)
    return BeginLoad(LoadId(load_id), AdapterId(adapter_id), source, layout, (), False)


def plan_of(*starts: int, adapter_id: int | None = None) -> StepPlan:
    return StepPlan(
        tuple(
            ScheduledChunk(make_sequence(i, [1, 2, 3], adapter_id), start, 1, True)
            for i, start in enumerate(starts)
        )
    )


def test_steps_tell_their_kind_and_the_first_use_of_a_load() -> None:
    recorder, names = ListRecorder(), LoadNames()
    names.begin(begin_load(7, 1))
    runner = TracedRunner(InstantRunner(), names, recorder, None, DeviceTimes(recorder))
    for plan in (plan_of(0, adapter_id=1), plan_of(0, 3, adapter_id=1), plan_of(3, 4)):
        runner.launch(plan).wait()
    steps = [span for span in recorder.spans if span[0] == "forward stream"]
    assert [step[4]["kind"] for step in steps] == ["prefill", "mixed", "decode"]
    assert [step[4]["first_uses"] for step in steps] == ["shout", "", ""]
    assert recorder.flows == [("step thread", "load", 7, Flow.END)]
    assert all(a[3] <= b[2] for a, b in pairwise(steps))


def test_device_times_keep_their_distances_and_wait_for_no_step() -> None:
    recorder = ListRecorder()
    times = DeviceTimes(recorder)
    late = Reached(27.0, done=False)
    times.add_step(Reached(10.0), Reached(14.0), 1.0, {})
    times.add_step(Reached(15.0), Reached(20.0), 1.001, {})
    times.add_step(Reached(21.0), late, 1.002, {})
    times.record_done()
    spans = [(begin_s, end_s) for _, _, begin_s, end_s, _ in recorder.spans]
    expected = [(1.0, 1.004), (1.005, 1.010)]
    for span, (begin_s, end_s) in zip(spans, expected, strict=True):
        assert math.isclose(span[0], begin_s) and math.isclose(span[1], end_s)
    late.done = True
    times.record_done()
    assert len(recorder.spans) == 3


def test_a_group_of_layers_is_a_span_within_its_steps() -> None:
    recorder, names = ListRecorder(), LoadNames()
    names.begin(begin_load(7, 1))
    groups = TracedGroups(names, recorder, None)
    chunk = ScheduledChunk(make_sequence(1, [1, 2, 3], 1), 0, 3, True)

    class RunnerOfGroups:
        def launch(
            self, plan: StepPlan, between: Callable[[], None] = nothing_between
        ) -> LaunchedStep:
            assert plan.layer_group is not None
            with groups.around(plan.layer_group):
                return InstantStep()

    runner = TracedRunner(RunnerOfGroups(), names, recorder, None, groups.device_times)
    runner.launch(StepPlan((), LayerGroup(chunk, range(2, 8), 32)))
    (layers,) = (span for span in recorder.spans if span[0] == "forward stream, layers")
    (step,) = (span for span in recorder.spans if span[0] == "forward stream")
    assert (layers[1], layers[4]) == ("layers", {"adapter": "shout", "layers": "2-7", "tokens": 3})
    assert step[4]["kind"] == "layers" and step[4]["first_uses"] == "shout"
    assert step[2] <= layers[2] <= layers[3] <= step[3]
    assert recorder.flows == [("step thread", "load", 7, Flow.END)]


def test_a_group_lies_within_its_step_on_the_device_too() -> None:
    recorder = ListRecorder()
    times = DeviceTimes(recorder)
    times.add_step(Reached(10.0), Reached(14.0), 1.0, {})
    times.add_group(Reached(17.0), Reached(19.0), 1.001, {})
    times.add_step(Reached(15.0), Reached(20.0), 1.001, {})
    times.record_done()
    spans = [(name, begin_s, end_s) for _, name, begin_s, end_s, _ in recorder.spans]
    expected = [("step", 1.0, 1.004), ("layers", 1.007, 1.009), ("step", 1.005, 1.010)]
    for span, (name, begin_s, end_s) in zip(spans, expected, strict=True):
        assert span[0] == name
        assert math.isclose(span[1], begin_s) and math.isclose(span[2], end_s)


class NoSlots:
    """Slots that nobody looks at."""

    def begin(self, load: BeginLoad) -> None:
        pass

    def abandon(self, load_id: LoadId) -> None:
        pass

    def install(self, adapter: InstallAdapter) -> None:
        pass

    def remove(self, adapter_id: AdapterId) -> None:
        pass


def test_a_load_keeps_its_name_behind_its_first_layers() -> None:
    names = LoadNames()
    slots = TracedSlots(NoSlots(), names)
    load = begin_load(7, 1)
    slots.begin(load)
    slots.install(InstallAdapter(AdapterId(1), make_manifest(1), load.layout, ()))
    assert (names.name(LoadId(7)), names.adapter_name(AdapterId(1))) == ("shout", "shout")
    slots.remove(AdapterId(1))
    slots.abandon(LoadId(7))
    assert (names.name(LoadId(7)), names.adapter_name(AdapterId(1))) == ("", "")
