"""What is read out of a trace's file."""

from pathlib import Path

import pytest

from engine.trace_tracks import FORWARD_TRACK, STEP_TRACK
from ipc.errors import InvalidRequest
from ipc.trace import Flow, TraceRecorder, create_trace
from tools.trace_file import Span, busy_share, read_trace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three steps on the forward stream, each with its launch on the step thread."""
    path = tmp_path / "trace.json"
    create_trace(path)
    recorder = TraceRecorder(path, "engine")
    recorder.flow(STEP_TRACK, "load", 7, Flow.END, 10.0)
    for begin_s, end_s in ((10.0, 11.0), (12.0, 14.0), (19.0, 21.0)):
        recorder.span(STEP_TRACK, "launch", begin_s - 0.5, begin_s - 0.4, {})
        recorder.span(FORWARD_TRACK, "step", begin_s, end_s, {"tokens": 3})
    recorder.close()
    return path


def test_spans_come_back_with_their_process_track_and_times(path: Path) -> None:
    trace = read_trace(path)
    assert len(trace.spans) == 6
    assert trace.spans[1] == Span("engine", FORWARD_TRACK, "step", 10.0, 11.0, {"tokens": 3})
    assert trace.num_dropped == 0


def test_a_line_that_its_writer_was_killed_over_is_left_out(path: Path) -> None:
    before = read_trace(path)
    with path.open("a") as file:
        file.write('{"ph":"X","name":"st')
    assert read_trace(path) == before


def test_events_that_were_dropped_are_counted_over_all_processes(path: Path) -> None:
    for number_dropped in (1, 2):
        recorder = TraceRecorder(path, "loader", max_events=1)
        for _ in range(1 + number_dropped):
            recorder.span("reads", "read", 1.0, 2.0, {})
        recorder.close()
    assert read_trace(path).num_dropped == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "expected [ in line 1, got b'{}'"),
        ('[\n{"ph":1},\n', "line 2: Expected `str`, got `int` - at `$.ph`"),
    ],
)
def test_what_is_no_trace_is_told_by_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        read_trace(path)
    assert caught.value.message == f"trace {path}: {message}"


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        read_trace(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("begin_s", "end_s", "share"),
    [(10.0, 14.0, 0.75), (10.5, 13.0, 0.6), (14.0, 19.0, 0.0), (10.0, 20.0, 0.4)],
)
def test_only_the_forward_streams_steps_within_the_window_are_busy(
    path: Path, begin_s: float, end_s: float, share: float
) -> None:
    assert busy_share(read_trace(path), begin_s, end_s) == pytest.approx(share)
