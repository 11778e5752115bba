"""A device on a CPU whose streams lag as far behind the host as they may.

What a stream is given runs only once somebody waits for it: the host for an event, or the other
stream. So a wait that is missing shows as work done in the wrong order, every time.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable

from engine.device import CpuDevice, Event


class _Stream:
    def __init__(self) -> None:
        self.num_given = 0
        self.num_done = 0
        self._work: deque[Callable[[], None]] = deque()

    def give(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self.num_given += 1

    def run_up_to(self, count: int) -> None:
        while self.num_done < count:
            self._work.popleft()()
            self.num_done += 1


class _Mark:
    """An event: the end of the first ``count`` pieces of the stream's work."""

    def __init__(self, stream: _Stream, count: int, lock: threading.RLock) -> None:
        self.count = count
        self._stream = stream
        self._lock = lock

    def synchronize(self) -> None:
        with self._lock:
            self._stream.run_up_to(self.count)

    def query(self) -> bool:
        with self._lock:
            return self._stream.num_done >= self.count


class LateStreams(CpuDevice):
    """The steps of a test are given to ``give_forward``; all the rest is as on any device."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._forward = _Stream()
        self._load = _Stream()

    @property
    def is_asynchronous(self) -> bool:
        return True

    def give_forward(self, work: Callable[[], None]) -> Event:
        """Work for the forward stream, and the event behind it."""
        with self._lock:
            self._forward.give(work)
            return self.record_forward_event()

    def load_stream_copy(self, target: int, source: int, num_bytes: int) -> None:
        def copy() -> None:
            ctypes.memmove(target, source, num_bytes)

        with self._lock:
            self._load.give(copy)

    def new_load_event(self) -> Event:
        return _Mark(self._load, 0, self._lock)

    def record_load_event(self, event: Event) -> None:
        assert isinstance(event, _Mark)
        with self._lock:
            event.count = self._load.num_given

    def record_forward_event(self) -> Event:
        with self._lock:
            return _Mark(self._forward, self._forward.num_given, self._lock)

    def load_stream_wait(self, event: Event) -> None:
        with self._lock:
            self._load.give(event.synchronize)

    def synchronize(self) -> None:
        with self._lock:
            for stream in (self._load, self._forward):
                stream.run_up_to(stream.num_given)
