"""Copies within a GPU's memory by its driver.

A tensor's ``copy_`` costs several times the Python, and an adapter that lies in many pieces takes
tens of thousands of copies a second.

Source: CUDA driver API, "Memory Management", through ``cuda-bindings``.
"""

from cuda.bindings import driver

from ipc.cuda_memory import checked
from ipc.errors import Unavailable


class StreamCopies:
    """Enqueues copies on ``stream``, which belongs to the device's primary context: torch's.

    Raises:
        Unavailable: the driver refuses.
    """

    def __init__(self, device: int, stream: int) -> None:
        self._stream = driver.CUstream(stream)
        # To ask for copies beside kernels (the attribute of cuMemcpyBatchAsync) changed nothing
        # that a step could feel, and cost 20 µs more a chunk, as measured on one H200.
        self._copy = driver.cuMemcpyDtoDAsync
        self._success = driver.CUresult.CUDA_SUCCESS
        checked(driver.cuInit, 0)
        # Never given back: torch keeps it, too, as long as the process lives.
        self._context = checked(
            driver.cuDevicePrimaryCtxRetain, checked(driver.cuDeviceGet, device)
        )

    def enter(self) -> None:
        """Makes the context current on the calling thread; ``enqueue`` needs it there."""
        checked(driver.cuCtxSetCurrent, self._context)

    def enqueue(self, target: int, source: int, num_bytes: int) -> None:
        """Both are addresses of device memory. Raises ``Unavailable`` if the driver refuses."""
        # Not through ``checked``, which costs half as much again.
        (status,) = self._copy(target, source, num_bytes, self._stream)
        if status != self._success:
            raise Unavailable(f"a copy of {num_bytes} bytes on the GPU failed: {status.name}")
