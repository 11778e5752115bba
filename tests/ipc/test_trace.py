"""A trace holds whole lines of every process, and never more in memory than it may."""

import threading
from pathlib import Path

import pytest

from ipc.errors import InvalidRequest
from ipc.trace import Flow, TraceRecorder, create_trace
from tests.trace_events import read_events


def named(events: list[dict[str, object]], name: str) -> list[dict[str, object]]:
    return [event for event in events if event["name"] == name]


def test_events_of_many_threads_and_two_recorders_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    create_trace(path)
    recorders = [TraceRecorder(path, name) for name in ("engine", "loader")]
    threads = [
        threading.Thread(
            target=lambda track=f"track {n}", recorder=recorders[n % 2]: [
                recorder.span(track, "work", i, i + 0.5, {"n": i}) for i in range(500)
            ]
        )
        for n in range(6)
    ]
    for recorder in recorders:
        recorder.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for recorder in recorders:
        recorder.close()
    events = read_events(path)
    assert len(named(events, "work")) == 3000
    names = [event["args"]["name"] for event in named(events, "process_name")]  # type: ignore[index]
    assert names == ["engine", "loader"]
    assert len(named(events, "thread_name")) == 6


def test_what_is_too_much_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    create_trace(path)
    recorder = TraceRecorder(path, "engine", max_events=10)
    for i in range(25):
        recorder.span("track", "work", i, i + 1, {})
    recorder.close()
    events = read_events(path)
    assert len(named(events, "work")) == 10
    assert named(events, "dropped_events")[0]["args"] == {"name": 15}


def test_times_are_microseconds_and_flows_bind_to_the_span_around_them(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    create_trace(path)
    recorder = TraceRecorder(path, "engine")
    recorder.span("steps", "step", 2.0, 2.25, {"tokens": 3})
    recorder.flow("steps", "load", 7, Flow.END, 2.0)
    recorder.close()
    _, _, span, flow, _ = read_events(path)
    assert (span["ts"], span["dur"], span["args"]) == (2e6, 250e3, {"tokens": 3})
    assert (flow["ph"], flow["id"], flow["ts"], flow["bp"]) == ("f", 7, 2e6, "e")
    assert (flow["pid"], flow["tid"]) == (span["pid"], span["tid"])


def test_a_trace_that_can_not_be_written_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "trace.json"
    with pytest.raises(InvalidRequest, match=f"--trace: expected .* got {path}: No such file"):
        create_trace(path)
