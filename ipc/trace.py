"""What every process did when, in one file that Perfetto and chrome://tracing open.

The file is Chrome's trace event format in its JSON array form: ``[``, then one event a line, each
with a comma behind it. The array's end is optional, so that processes can append for as long as
they live, and a file whose writer was killed is read up to its last whole line. Times are µs of
CLOCK_MONOTONIC, which all processes of a machine share.

Source: the "Trace Event Format" document of the Chromium project.
"""

import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from ipc.errors import InvalidRequest

logger = logging.getLogger(__name__)

MAX_EVENTS = 65_536
_WRITE_INTERVAL_S = 0.1
_CLOSE_TIMEOUT_S = 2.0

Args = Mapping[str, str | int | float | bool]


class Flow(Enum):
    """An arrow from span to span; each end lies within the span that it belongs to."""

    BEGIN = "s"
    STEP = "t"
    END = "f"


class Recorder(Protocol):
    """Takes events from any thread and never blocks. Times are those of ``time.monotonic``.

    Without ``enabled`` what it is given is lost, and need not be put together.
    """

    @property
    def enabled(self) -> bool: ...

    def span(self, track: str, name: str, begin_s: float, end_s: float, args: Args) -> None:
        """Something took from ``begin_s`` to ``end_s``. Spans of one track must not overlap."""

    def flow(self, track: str, kind: str, flow_id: int, flow: Flow, at_s: float) -> None:
        """The arrow ``flow_id`` of this kind touches the span of ``track`` at ``at_s``."""


class NullRecorder:
    """No trace was asked for."""

    enabled: Final = False

    def span(self, track: str, name: str, begin_s: float, end_s: float, args: Args) -> None:
        pass

    def flow(self, track: str, kind: str, flow_id: int, flow: Flow, at_s: float) -> None:
        pass


NO_TRACE: Final = NullRecorder()


class TraceRecorder:
    """Appends to the file at ``path`` from a thread of its own, whole lines at a time.

    At most about ``max_events`` wait to be written: further ones are dropped, and ``close`` writes
    how many.

    Raises:
        OSError: the file can not be opened.
    """

    enabled: Final = True

    def __init__(self, path: Path, process_name: str, max_events: int = MAX_EVENTS) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._pid = os.getpid()
        self._max_events = max_events
        # Both are appended to or advanced in one step that the interpreter does not interrupt.
        self._events: deque[tuple[str, dict[str, Any]]] = deque()
        self._drops = itertools.count()
        self._tracks: dict[str, int] = {}
        self._encoder = msgspec.json.Encoder()
        self._broken = False
        self._closing = threading.Event()
        self._write([self._metadata("process_name", 0, process_name)])
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def span(self, track: str, name: str, begin_s: float, end_s: float, args: Args) -> None:
        event = {"ph": "X", "name": name, "ts": _us(begin_s), "dur": _us(end_s - begin_s)}
        self._put(track, event | {"args": args})

    def flow(self, track: str, kind: str, flow_id: int, flow: Flow, at_s: float) -> None:
        event = {"ph": flow.value, "name": kind, "cat": kind, "id": flow_id, "ts": _us(at_s)}
        # The end, too, belongs to the span around it and not to the one that follows.
        self._put(track, event | {"bp": "e"} if flow is Flow.END else event)

    def close(self) -> None:
        """Writes what is left and how many events were dropped. Nothing may be recorded after."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                return  # The disk hangs; the descriptor is the thread's.
        self._drain()
        num_dropped = next(self._drops)
        self._write([self._metadata("dropped_events", 0, num_dropped)])
        os.close(self._fd)

    def _put(self, track: str, event: dict[str, Any]) -> None:
        if len(self._events) < self._max_events:
            self._events.append((track, event))
        else:
            next(self._drops)

    def _run(self) -> None:
        while not self._closing.wait(_WRITE_INTERVAL_S):
            self._drain()

    def _drain(self) -> None:
        events = []
        for _ in range(len(self._events)):
            track, event = self._events.popleft()
            if track not in self._tracks:
                self._tracks[track] = len(self._tracks) + 1
                events.append(self._metadata("thread_name", self._tracks[track], track))
            events.append(event | {"pid": self._pid, "tid": self._tracks[track]})
        self._write(events)

    def _metadata(self, name: str, tid: int, value: str | int) -> dict[str, Any]:
        return {"ph": "M", "name": name, "pid": self._pid, "tid": tid, "args": {"name": value}}

    def _write(self, events: list[dict[str, Any]]) -> None:
        if not events or self._broken:
            return
        lines = b"".join(self._encoder.encode(event) + b",\n" for event in events)
        try:
            # One call: the kernel keeps the appends of several processes apart.
            if os.write(self._fd, lines) == len(lines):
                return
            reason = "the disk took only a part of it"
        except OSError as error:
            reason = error.strerror or str(error)
        # What follows half a line would make it unreadable in its middle.
        self._broken = True
        logger.error("the trace ends here: %s", reason)


def create_trace(path: Path) -> None:
    """Makes ``path`` an empty trace, for the recorders of any number of processes.

    Raises:
        InvalidRequest: no file can be written there.
    """
    try:
        path.write_bytes(b"[\n")
    except OSError as error:
        raise InvalidRequest(
            f"--trace: expected a file that can be written, got {path}: {error.strerror}"
        ) from error


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def open_recorder(path: str | None, process_name: str) -> TraceRecorder | None:
    """A recorder that runs, its ``close`` the caller's; None without a path, or without a file.

    A server whose trace can not be written serves nevertheless.
    """
    if path is None:
        return None
    try:
        recorder = TraceRecorder(Path(path), process_name)
    except OSError as error:
        logger.error("no trace is written to %s: %s", path, error.strerror)
        return None
    recorder.start()
    return recorder
