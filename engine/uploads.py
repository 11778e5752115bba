"""Small host arrays on their way to the GPU, while the step before still runs."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.device import Event
from engine.kernels.host_reads import read_host

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Rows:
    """All but the first ``head`` words of an array are rows of ``width`` words.

    In the target they begin ``pitch`` words apart. A word has 4 bytes.
    """

    head: int
    width: int
    pitch: int


class Circle:
    """Which bytes of a buffer that is used in a circle may be written anew.

    Each ``take`` is followed by ``read_until``, and those events are done in their order.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._next = 0
        # Ranges of bytes that are being read, the oldest first.
        self._enqueued: deque[tuple[int, int, Event]] = deque()

    def take(self, num_bytes: int) -> int:
        """Where so many bytes begin that nothing reads any more; waits for that if it must."""
        assert 0 < num_bytes <= self._num_bytes, (num_bytes, self._num_bytes)
        start = -(-self._next // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > self._num_bytes:
            start = 0
        stop = start + num_bytes
        while self._enqueued and self._enqueued[0][2].query():
            self._enqueued.popleft()
        while any(first < stop and start < last for first, last, _ in self._enqueued):
            self._enqueued.popleft()[2].synchronize()
        self._next = stop
        return start

    def read_until(self, start: int, stop: int, event: Event) -> None:
        """Bytes ``[start, stop)`` are read until ``event`` is done."""
        self._enqueued.append((start, stop, event))


class Uploads:
    """Brings arrays to the GPU in order on the current stream, and does not wait until they are.

    Owns ``num_bytes`` of pinned memory, which arrays take in a circle. Only one that meets an array
    that has still to be read makes the caller wait. Used by one thread.
    """

    def __init__(self, num_bytes: int) -> None:
        self._pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._bytes: npt.NDArray[np.uint8] = self._pinned.numpy()
        self._circle = Circle(num_bytes)

    def send(self, array: npt.NDArray[Any], target: Tensor, rows: Rows | None = None) -> None:
        """What the current stream is given from now on finds ``array`` in ``target``.

        Both consist of whole words of 4 bytes; ``target`` is contiguous and holds at least what
        ``rows`` asks for (None: the words as they lie). The caller keeps ``array``.
        """
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if not source.size:
            return
        assert source.size % 4 == 0, f"whole words are sent: got {source.size} bytes"
        words = target.view(-1).view(torch.int32)
        if source.size > len(self._bytes):
            # Torch keeps the pinned block back until the copy that reads it is done.
            pinned = torch.from_numpy(source).pin_memory()
            _read(pinned.to(words.device, non_blocking=True), words, rows)
            return
        start = self._circle.take(source.size)
        stop = start + source.size
        self._bytes[start:stop] = source
        _read(self._pinned[start:stop], words, rows)
        read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        read.record()
        self._circle.read_until(start, stop, read)


def _read(source: Tensor, words: Tensor, rows: Rows | None) -> None:
    words_read = source.view(torch.int32)
    if rows is None:
        read_host(words_read, words, head=words_read.numel(), width=1, pitch=1)
    else:
        read_host(words_read, words, rows.head, rows.width, rows.pitch)
