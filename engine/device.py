"""The one place that knows whether the engine runs on a CPU or on a GPU.

Two streams exist: the *forward* stream runs the model, the *load* stream copies adapters into the
pool. An event marks a point in one of them; the load stream can wait for it without the host
waiting. The forward stream waits for no copy: what it is given was seen to be in place before. On
a CPU both streams are the thread that calls, work is done when a call returns, and events are
complete from the start.
"""

import ctypes
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import DeviceKind, ModelDType
from engine.memory_plan import DeviceMemory
from ipc.base_model import DType
from ipc.errors import InvalidRequest

if TYPE_CHECKING:
    from engine.cuda_copies import StreamCopies
    from engine.uploads import Rows

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
}


# Many steps' inputs: the host is one step ahead.
_UPLOAD_BYTES = 8 << 20


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Returns once everything before the event is done."""

    def query(self) -> bool:
        """Whether everything before the event is done; does not wait."""
        ...


class TimedEvent(Event, Protocol):
    """A point of which the time can be asked for, once it was reached."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this event to ``end``, another one of the same stream."""
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

    def upload_into(self, array: npt.NDArray[Any], target: Tensor) -> None:
        """What the forward stream is given from now on finds ``array`` in ``target``.

        ``target`` is contiguous and as many bytes long. The caller keeps ``array``.
        """

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

        Meant to be entered once, around a thread's whole life.
        """
        ...

    def load_stream_copy(self, target: int, source: int, num_bytes: int) -> None:
        """Enqueues a copy between two addresses of this device's memory on the load stream.

        Only within ``load_stream``. Both must stay valid until an event behind it is done.

        Raises:
            Unavailable: the device refuses.
        """
        ...

    def new_load_event(self) -> Event:
        """An event for ``record_load_event``, done as long as it has not been recorded.

        Whoever waits for it sleeps meanwhile.
        """
        ...

    def record_load_event(self, event: Event) -> None:
        """``event`` marks the end of what the load stream was given so far, not what it did."""

    def record_forward_event(self) -> Event:
        """Marks the end of what the forward stream was given so far."""
        ...

    def record_timed_event(self) -> TimedEvent:
        """As ``record_forward_event``; the time between two of them can be asked for."""
        ...

    def load_stream_wait(self, event: Event) -> None:
        """What the load stream is given from now on begins after ``event``."""

    def synchronize(self) -> None:
        """Returns once both streams, and whatever else was enqueued, are done."""


class _DoneEvent:
    """An event on a CPU: the work before it ended before it was recorded."""

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Moment(_DoneEvent):
    """The time at which the thread was there."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()

    def elapsed_time(self, end: "_Moment", /) -> float:
        return 1e3 * (end._at_s - self._at_s)


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

    def upload_into(self, array: npt.NDArray[Any], target: Tensor) -> None:
        source = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        target.view(-1).view(torch.uint8).copy_(source)

    def download(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @property
    def is_asynchronous(self) -> bool:
        return False

    def forward_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load_stream_copy(self, target: int, source: int, num_bytes: int) -> None:
        # Other threads run meanwhile, as they do beside a GPU's copy.
        ctypes.memmove(target, source, num_bytes)

    def new_load_event(self) -> Event:
        return _DoneEvent()

    def record_load_event(self, event: Event) -> None:
        pass

    def record_forward_event(self) -> Event:
        return _DoneEvent()

    def record_timed_event(self) -> TimedEvent:
        return _Moment()

    def load_stream_wait(self, event: Event) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        pass


class CudaDevice:
    """One GPU with a forward and a load stream of its own.

    Arrays go to it by kernels that read pinned memory: see ``engine.kernels.host_reads``.
    """

    def __init__(self, index: int = 0) -> None:
        # Imported here alone: a machine without a GPU need not have Triton.
        from engine.uploads import Uploads

        self._device = torch.device("cuda", index)
        self._forward = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._load = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._copies: StreamCopies | None = None
        self._uploads = Uploads(_UPLOAD_BYTES)

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
        target = torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=self._device)
        self._uploads.send(array, target)
        return target

    def upload_into(
        self, array: npt.NDArray[Any], target: Tensor, rows: "Rows | None" = None
    ) -> None:
        """As for every device; ``rows`` says where in ``target`` if not as they lie."""
        with self.forward_stream():
            self._uploads.send(array, target, rows)

    def download(self, tensor: Tensor) -> Tensor:
        # Torch keeps the pinned block back until the copy that writes it is done.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    @property
    def is_asynchronous(self) -> bool:
        return True

    def forward_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._forward)

    @contextmanager
    def load_stream(self) -> Iterator[None]:
        if self._copies is None:
            # Imported here alone: a machine without a GPU need not have the driver's bindings.
            from engine.cuda_copies import StreamCopies

            self._copies = StreamCopies(self._device.index or 0, self._load.cuda_stream)
        self._copies.enter()
        with torch.cuda.stream(self._load):
            yield

    def load_stream_copy(self, target: int, source: int, num_bytes: int) -> None:
        assert self._copies is not None, "copies are given within load_stream"
        self._copies.enqueue(target, source, num_bytes)

    def new_load_event(self) -> Event:
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def record_load_event(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), event
        event.record(self._load)

    def record_forward_event(self) -> Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._forward)
        return event

    def record_timed_event(self) -> TimedEvent:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._forward)
        return event

    def load_stream_wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), event
        self._load.wait_event(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


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
