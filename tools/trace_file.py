"""Reads what ``--trace`` has written, for figures and pictures of it.

Times are seconds of ``time.monotonic``, as in the processes that wrote it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.trace_tracks import FORWARD_TRACK
from ipc.errors import InvalidRequest


class _Event(msgspec.Struct, frozen=True):
    """One line. Source: the "Trace Event Format" document of the Chromium project."""

    ph: str
    name: str
    pid: int
    tid: int
    ts: float = 0.0
    dur: float = 0.0
    args: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Span:
    """Something took from ``begin_s`` to ``end_s``; spans of one process's track never overlap."""

    process: str
    track: str
    name: str
    begin_s: float
    end_s: float
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trace:
    """Spans in the order in which they were written. ``num_dropped`` events are missing."""

    spans: tuple[Span, ...]
    num_dropped: int


def read_trace(path: Path) -> Trace:
    """What the file holds, up to its last whole line.

    Raises:
        InvalidRequest: it can not be read, or is no trace of ours.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"trace {path}: {error.strerror}") from error
    first, *lines = text.split(b"\n")
    if first != b"[":
        raise InvalidRequest(f"trace {path}: expected [ in line 1, got {first[:40]!r}")
    # Behind the last line break there is nothing, or what a writer was killed over.
    lines = lines[:-1]
    decoder = msgspec.json.Decoder(_Event)
    events: list[_Event] = []
    for number, line in enumerate(lines, start=2):
        try:
            events.append(decoder.decode(line.removesuffix(b",")))
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"trace {path}: line {number}: {error}") from error
    processes: dict[int, str] = {}
    tracks: dict[tuple[int, int], str] = {}
    num_dropped = 0
    for event in events:
        if event.ph != "M":
            continue
        match event.name:
            case "process_name":
                processes[event.pid] = str(event.args["name"])
            case "thread_name":
                tracks[event.pid, event.tid] = str(event.args["name"])
            case "dropped_events":
                num_dropped += int(event.args["name"])
    spans = tuple(
        Span(
            processes.get(event.pid, ""),
            tracks.get((event.pid, event.tid), ""),
            event.name,
            event.ts / 1e6,
            (event.ts + event.dur) / 1e6,
            event.args,
        )
        for event in events
        if event.ph == "X"
    )
    return Trace(spans, num_dropped)


def busy_share(trace: Trace, begin_s: float, end_s: float) -> float:
    """How much of ``[begin_s, end_s)`` the forward stream was in a step, of [0, 1].

    A step is busy from the moment at which the device comes to it until it is done, so also while
    it waits for an event of another stream.
    """
    busy_s = sum(
        max(0.0, min(span.end_s, end_s) - max(span.begin_s, begin_s))
        for span in trace.spans
        if span.track == FORWARD_TRACK
    )
    return busy_s / (end_s - begin_s)
