"""Steps are recorded as they ran, and each load's first use once."""

import math
from itertools import pairwise

from engine.adapter_actions import BeginLoad
from engine.plan import LaunchedStep, SampledToken, ScheduledChunk, StepPlan
from engine.step_trace import DeviceTimes, LoadNames, TracedRunner
from ipc.image import layout_image
from ipc.messages import AdapterId, AdapterSource, LoadId
from ipc.trace import Flow
from tests.engine.builders import BASE, make_manifest, make_sequence
from tests.trace_events import ListRecorder


class InstantStep:
    def wait(self) -> list[SampledToken]:
        return []


class InstantRunner:
    def launch(self, plan: StepPlan) -> LaunchedStep:
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
    return BeginLoad(LoadId(load_id), AdapterId(adapter_id), source, layout, ())


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
    runner = TracedRunner(InstantRunner(), names, recorder, None)
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
    times.add(Reached(10.0), Reached(14.0), 1.0, {})
    times.add(Reached(15.0), Reached(20.0), 1.001, {})
    times.add(Reached(21.0), late, 1.002, {})
    times.record_done()
    spans = [(begin_s, end_s) for _, _, begin_s, end_s, _ in recorder.spans]
    expected = [(1.0, 1.004), (1.005, 1.010)]
    for span, (begin_s, end_s) in zip(spans, expected, strict=True):
        assert math.isclose(span[0], begin_s) and math.isclose(span[1], end_s)
    late.done = True
    times.record_done()
    assert len(recorder.spans) == 3
