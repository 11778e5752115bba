"""``sidestream timeline``, from a recorded file to its picture and its table."""

import os
from pathlib import Path

import pytest

from ipc.errors import InvalidRequest
from ipc.trace import TraceRecorder, create_trace
from tests.tools.timeline.traces import one_load
from tools.cli import main
from tools.timeline.command import choose_window
from tools.timeline.figures import Window


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trace made by hand, as the two processes write it."""
    path = tmp_path / "trace.json"
    create_trace(path)
    for pid, process in enumerate(("engine", "loader"), start=1):
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", lambda pid=pid: pid)
            recorder = TraceRecorder(path, process)
        for span in one_load().spans:
            if span.process == process:
                begin_s, end_s = 100 + span.begin_s, 100 + span.end_s
                recorder.span(span.track, span.name, begin_s, end_s, span.args)
        recorder.close()
    return path


def test_a_trace_becomes_a_picture_beside_it_and_a_table(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["timeline", str(path)]) == 0
    picture = path.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "trace.json, from 0.000 s to 0.060 s"
    told = {line[:33].strip(): line[33:].strip() for line in lines[1:-1]}
    assert told == {
        "forward stream busy": "90.0%",
        "steps": "3",
        "layer groups": "0, 0 before the load's end",
        "longest gap between two steps": "4.00 ms",
        "loads": "1, 0.0 MB",
        "load time beside a running step": "81.8%",
        "load time beside its own prefill": "0.0%",
        "mean read": "10.00 ms",
        "mean stage": "8.00 ms",
        "mean copy": "10.00 ms",
        "mean wait to first use": "12.00 ms",
    }
    assert lines[-1] == f"drawn: {picture}"


def test_the_window_and_the_picture_are_chosen_by_option(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "other.png"
    arguments = ["--from", "0.012", "--to", "0.022", "--out", str(picture)]
    assert main(["timeline", str(path), *arguments]) == 0
    assert picture.exists() and not path.with_suffix(".png").exists()
    out = capsys.readouterr().out
    assert out.startswith("trace.json, from 0.012 s to 0.022 s")
    assert "80.0%" in out


def test_one_end_of_the_window_is_enough() -> None:
    trace = one_load()
    assert choose_window(trace, 0.020, None) == Window(0.020, 0.060)
    assert choose_window(trace, None, 0.020) == Window(0.0, 0.020)
    assert choose_window(trace, None, 9.0) == Window(0.0, 0.060)


def test_a_window_behind_the_traces_end_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"--from: expected less than 0\.060 s, .* got 3"):
        choose_window(one_load(), 3.0, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[\n", "expected at least one step, got none"),
        ("{}\n", "expected [ in line 1, got b'{}'"),
        ('[\n{"ph":"X","name":"a","pid":1,"tid":1,"ts":"x"},\n', "line 2: Expected `float`"),
    ],
)
def test_what_can_not_be_drawn_is_one_line_of_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    assert main(["timeline", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_the_trace_itself_is_never_drawn_over(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = path.read_bytes()
    assert main(["timeline", str(path), "--out", str(path)]) == 1
    assert path.read_bytes() == before
    assert "expected another file than the trace" in capsys.readouterr().err
