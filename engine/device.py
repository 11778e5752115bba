"""The one place that knows whether the engine runs on a CPU or on a GPU.

Two streams exist: the *forward* stream runs the model, the *load* stream copies adapters into the
pool. An event marks a point in one of them; the other can wait for it without the host waiting. On
a CPU both streams are the thread that calls, work is done when a call returns, and events are
complete from the start.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import DeviceKind, ModelDType
from engine.memory_plan import DeviceMemory
from ipc.base_model import DType
from ipc.errors import InvalidRequest

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
}


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Returns once everything before the event is done."""

    def query(self) -> bool:
        """Whether everything before the event is done; does not wait."""
        ...


class Device(Protocol):
    """Where tensors live, and the order in which work on them happens."""

    @property
    def torch_device(self) -> torch.device: ...

    def auto_dtype(self, model_dtype: DType) -> DType:
        """What ``--dtype auto`` means here for a model stored as ``model_dtype``."""
        ...

    def memory(self) -> DeviceMemory | None:
        """What the device's own memory has free, after giving back what nobody uses; CPU: None."""
        ...

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """A tensor here with the array's values, ready for the current stream's next work.

        On a CPU it shares the array's memory: the caller gives the array away.
        """
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """Enqueues a copy to the host on the current stream; an event behind it says it is there.

        On a CPU it is a copy, too, so that ``tensor`` may be overwritten.
        """
        ...

    @property
    def is_asynchronous(self) -> bool:
        """Whether work goes on after the call that enqueued it has returned."""
        ...

    def forward_stream(self) -> AbstractContextManager[object]:
        """Within it, the calling thread's work goes to the forward stream."""
        ...

    def load_stream(self) -> AbstractContextManager[object]:
        """Within it, the calling thread's work goes to the load stream.

        Meant to be entered once, around a thread's whole life: ``load_stream_copy`` is cheapest
        inside of it.
        """
        ...

    def load_stream_copy(self, destination: Tensor, source: Tensor) -> None:
        """Enqueues a copy on the load stream; both must live until an event behind it is done."""

    def record_load_event(self) -> Event:
        """Marks the end of what the load stream was given so far."""
        ...

    def record_forward_event(self) -> Event:
        """Marks the end of what the forward stream was given so far."""
        ...

    def load_stream_wait(self, event: Event) -> None:
        """What the load stream is given from now on begins after ``event``."""

    def forward_wait(self, event: Event) -> None:
        """What the forward stream is given from now on begins after ``event``."""

    def synchronize(self) -> None:
        """Returns once both streams, and whatever else was enqueued, are done."""


class _DoneEvent:
    """An event on a CPU: the work before it ended before it was recorded."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class CpuDevice:
    """Everything happens in the calling thread, in the order of the calls."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def auto_dtype(self, model_dtype: DType) -> DType:
        # Half precisions are slower than float32 on most CPUs, and less exact.
        return DType.FLOAT32

    def memory(self) -> DeviceMemory | None:
        return None

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array)

    def download(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @property
    def is_asynchronous(self) -> bool:
        return False

    def forward_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load_stream_copy(self, destination: Tensor, source: Tensor) -> None:
        destination.copy_(source)

    def record_load_event(self) -> Event:
        return _DoneEvent()

    def record_forward_event(self) -> Event:
        return _DoneEvent()

    def load_stream_wait(self, event: Event) -> None:
        event.synchronize()

    def forward_wait(self, event: Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        pass


class CudaDevice:
    """One GPU with a forward and a load stream of its own."""

    def __init__(self, index: int = 0) -> None:
        self._device = torch.device("cuda", index)
        self._forward = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._load = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def auto_dtype(self, model_dtype: DType) -> DType:
        return model_dtype

    def memory(self) -> DeviceMemory | None:
        self.synchronize()
        torch.cuda.empty_cache()
        return DeviceMemory(*torch.cuda.mem_get_info(self._device))

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        # Torch keeps the pinned block back until the copy that reads it is done.
        pinned = torch.from_numpy(array).pin_memory()
        return pinned.to(self._device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        # Torch keeps the pinned block back until the copy that writes it is done.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    @property
    def is_asynchronous(self) -> bool:
        return True

    def forward_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._forward)

    def load_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._load)

    def load_stream_copy(self, destination: Tensor, source: Tensor) -> None:
        if torch.cuda.current_stream(self._device) == self._load:
            destination.copy_(source, non_blocking=True)
        else:
            with torch.cuda.stream(self._load):
                destination.copy_(source, non_blocking=True)

    def record_load_event(self) -> Event:
        return self._record(self._load)

    def record_forward_event(self) -> Event:
        return self._record(self._forward)

    def load_stream_wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), event
        self._load.wait_event(event)

    def forward_wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), event
        self._forward.wait_event(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def _record(self, stream: torch.cuda.Stream) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event


def open_device(kind: DeviceKind) -> Device:
    """The device that ``kind`` names.

    Raises:
        InvalidRequest: ``cuda`` was asked for and torch sees no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if kind is DeviceKind.CUDA and not has_gpu:
        raise InvalidRequest(
            "device cuda: expected a GPU that torch can use, got none", param="device"
        )
    if kind is DeviceKind.CPU or not has_gpu:
        return CpuDevice()
    return CudaDevice()


def torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's name for ``dtype``."""
    return _TORCH_DTYPES[dtype]


def choose_dtype(requested: ModelDType, model_dtype: DType, device: Device) -> DType:
    """The dtype to compute in: as requested, or what ``auto`` means on this device."""
    if requested is ModelDType.AUTO:
        return device.auto_dtype(model_dtype)
    return DType(requested.value)
