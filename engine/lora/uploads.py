"""Small host arrays on their way to the device, while the step before still runs."""

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.device import Device, Event


class Uploads:
    """Copies arrays to the device, ordered on the forward stream, without waiting for the copies.

    Owns ``num_buffers`` pinned buffers of ``num_bytes`` each and uses them in turn. Only an array
    that comes while that many copies are still enqueued makes the caller wait, for the oldest.
    """

    def __init__(self, device: Device, num_bytes: int, num_buffers: int) -> None:
        pinned = device.torch_device.type == "cuda"
        self._device = device
        self._free = [
            torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(num_buffers)
        ]
        self._enqueued: deque[tuple[Event, Tensor]] = deque()

    def send(self, array: npt.NDArray[Any], target: Tensor) -> None:
        """What is given to the forward stream from now on finds ``array`` in ``target``.

        ``target`` is contiguous and as many bytes long. The caller keeps ``array``.
        """
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if not source.size:
            return
        buffer = self._take()
        buffer.numpy()[: source.size] = source
        with self._device.forward_stream():
            raw = target.view(-1).view(torch.uint8)
            raw.copy_(buffer[: source.size], non_blocking=True)
        self._enqueued.append((self._device.record_forward_event(), buffer))

    def _take(self) -> Tensor:
        while self._enqueued and (not self._free or self._enqueued[0][0].query()):
            copied, buffer = self._enqueued.popleft()
            copied.synchronize()
            self._free.append(buffer)
        return self._free.pop()
