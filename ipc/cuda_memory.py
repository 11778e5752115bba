"""The staging ring in GPU memory, shared by a file descriptor.

The engine creates the memory with ``cuMemCreate`` and exports it as a descriptor, which travels
like the descriptor of a ``HostRing``. The loader imports it and copies pinned host memory into it
on a stream of its own; it launches no kernel. The memory is the engine's: it outlives any loader.

Source: CUDA driver API, "Virtual Memory Management", through ``cuda-bindings``.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from cuda.bindings import driver

from ipc.errors import Unavailable
from ipc.messages import RingGrant, RingKind
from ipc.ring_memory import HostRegistrar

_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def checked(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a driver call returns besides its status. Raises ``Unavailable`` naming the call."""
    status, *results = call(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise Unavailable(f"{call.__name__} failed with {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


class _Mapping:
    """``num_bytes`` of the memory behind ``handle``, readable and writable at ``address``."""

    def __init__(self, handle: Any, num_bytes: int, device: int) -> None:
        """Owns ``handle``, also when it can not be mapped."""
        with ExitStack() as undo:
            undo.callback(checked, driver.cuMemRelease, handle)
            pointer = checked(driver.cuMemAddressReserve, num_bytes, 0, driver.CUdeviceptr(0), 0)
            undo.callback(checked, driver.cuMemAddressFree, pointer, num_bytes)
            checked(driver.cuMemMap, pointer, num_bytes, 0, handle, 0)
            undo.callback(checked, driver.cuMemUnmap, pointer, num_bytes)
            access = driver.CUmemAccessDesc()
            access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = device
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            checked(driver.cuMemSetAccess, pointer, num_bytes, [access], 1)
            self.address = int(pointer)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Unmaps the memory; the last process that maps it gives it back."""
        self._undo.close()


class CudaRing:
    """The engine's end. Must be made where the engine's CUDA context is current."""

    def __init__(self, device: int, num_chunks: int, chunk_bytes: int) -> None:
        properties = _allocation_properties(device)
        num_bytes = _mapped_bytes(properties, num_chunks * chunk_bytes)
        handle = checked(driver.cuMemCreate, num_bytes, properties, 0)
        self.fd: int = checked(driver.cuMemExportToShareableHandle, handle, _FD, 0)
        self.num_chunks = num_chunks
        self.chunk_bytes = chunk_bytes
        self._mapping = _Mapping(handle, num_bytes, device)

    def grant_kind(self) -> RingKind:
        return RingKind.CUDA

    def chunk_address(self, chunk: int) -> int:
        """The device address of the chunk's first byte."""
        return self._mapping.address + chunk * self.chunk_bytes

    def close(self) -> None:
        """Gives the memory back. Nothing may be reading it."""
        self._mapping.close()
        os.close(self.fd)


class CudaRingTarget:
    """The loader's end: copies on a stream of its own, in the device's primary context.

    Owns ``fd`` once it is made; one that can not be made leaves nothing behind and ``fd`` the
    caller's.

    Raises:
        Unavailable: the driver refuses.
    """

    def __init__(self, fd: int, grant: RingGrant, device: int = 0) -> None:
        self.num_chunks = grant.num_chunks
        self.chunk_bytes = grant.chunk_bytes
        self._device = device
        with ExitStack() as undo:
            self._context = _Context(device, undo)
            self._context.enter()
            properties = _allocation_properties(device)
            num_bytes = _mapped_bytes(properties, grant.num_chunks * grant.chunk_bytes)
            handle = checked(driver.cuMemImportFromShareableHandle, fd, _FD)
            self._mapping = _Mapping(handle, num_bytes, device)
            undo.callback(self._mapping.close)
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = checked(driver.cuStreamCreate, flags)
            undo.callback(checked, driver.cuStreamDestroy, self._stream)
            self._events = [self._make_event(undo) for _ in range(self.num_chunks)]
            self._undo = undo.pop_all()
        os.close(fd)

    def _make_event(self, undo: ExitStack) -> Any:
        # Waiting for it spins: one core, while a load is under way, for a chunk that is announced
        # some tens of microseconds earlier than an interrupt would have it.
        event_flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        event = checked(driver.cuEventCreate, event_flags)
        undo.callback(checked, driver.cuEventDestroy, event)
        return event

    def write(self, chunk: int, sources: Iterable[memoryview]) -> None:
        """Enqueues the copies, and behind them the event that ``synchronize`` waits for.

        Each source must lie in one registered range, or in none: the driver refuses a copy that
        reaches from one range into the next.
        """
        self._context.enter()
        target = self._mapping.address + chunk * self.chunk_bytes
        try:
            for source in sources:
                address, num_bytes = _address_of(source), source.nbytes
                checked(driver.cuMemcpyHtoDAsync, target, address, num_bytes, self._stream)
                target += num_bytes
        finally:
            # Also behind a failure: the copies before it are waited for like any other.
            checked(driver.cuEventRecord, self._events[chunk], self._stream)

    def synchronize(self, chunk: int) -> None:
        self._context.enter()
        checked(driver.cuEventSynchronize, self._events[chunk])

    def host_registrar(self) -> HostRegistrar:
        return CudaRegistrar(self._device)

    def close(self) -> None:
        """Waits for what was enqueued, then gives everything back; the engine's memory stays."""
        self._context.enter()
        checked(driver.cuStreamSynchronize, self._stream)
        self._undo.close()


class CudaRegistrar:
    """Pins host memory for the device's primary context, which lives as long as this does.

    Raises:
        Unavailable: the driver refuses.
    """

    def __init__(self, device: int = 0) -> None:
        with ExitStack() as undo:
            self._context = _Context(device, undo)
            self._undo = undo.pop_all()

    def register(self, memory: memoryview) -> None:
        self._context.enter()
        address = _address_of(memory)
        checked(driver.cuMemHostRegister, address, memory.nbytes, 0)
        self._undo.callback(checked, driver.cuMemHostUnregister, address)

    def close(self) -> None:
        self._context.enter()
        self._undo.close()


class _Context:
    """A device's primary context, held until ``undo`` is closed."""

    def __init__(self, device: int, undo: ExitStack) -> None:
        checked(driver.cuInit, 0)
        cuda_device = checked(driver.cuDeviceGet, device)
        self._handle = checked(driver.cuDevicePrimaryCtxRetain, cuda_device)
        undo.callback(checked, driver.cuDevicePrimaryCtxRelease, cuda_device)
        self._threads = threading.local()

    def enter(self) -> None:
        """Makes it the calling thread's current context, at next to no cost but for the first."""
        if not getattr(self._threads, "entered", False):
            checked(driver.cuCtxSetCurrent, self._handle)
            self._threads.entered = True


def _allocation_properties(device: int) -> Any:
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    properties.requestedHandleTypes = _FD
    return properties


def _mapped_bytes(properties: Any, num_bytes: int) -> int:
    """``num_bytes`` rounded up to what the device can map (2 MiB)."""
    granularity = checked(
        driver.cuMemGetAllocationGranularity,
        properties,
        driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
    )
    return int(-(-num_bytes // granularity) * granularity)


def _address_of(source: memoryview) -> int:
    """Where the bytes lie; the buffer must be writable (an arena's always is)."""
    return ctypes.addressof(ctypes.c_char.from_buffer(source))
