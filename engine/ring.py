"""The engine's end of the staging ring, as tensors."""

from typing import Any, Protocol

import torch

from engine.device import Device
from ipc.errors import InvalidRequest
from ipc.messages import RingKind
from ipc.ring_memory import HostRing


class Ring(Protocol):
    """Memory that the engine has allocated and can hand over by its descriptor."""

    fd: int
    num_chunks: int
    chunk_bytes: int

    def grant_kind(self) -> RingKind: ...

    def close(self) -> None: ...


class _DeviceBytes:
    """Lets torch see device memory that it did not allocate.

    Source: the CUDA array interface, version 3.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def open_ring(
    device: Device, num_chunks: int, chunk_bytes: int
) -> tuple[Ring, tuple[torch.Tensor, ...]]:
    """A new ring and its chunks, uint8 ``[chunk_bytes]`` each, valid until the ring is closed.

    Raises:
        InvalidRequest: the GPU's bindings are not installed.
        Unavailable: the driver refuses.
    """
    if device.torch_device.type == "cuda":
        # Imported here alone: a machine without a GPU need not have the driver's bindings.
        try:
            from ipc.cuda_memory import CudaRing
        except ImportError as error:
            raise InvalidRequest(
                f"a GPU's staging ring needs the package cuda-bindings ({error}):"
                " install sidestream[cuda]",
                param="device",
            ) from error

        cuda_ring = CudaRing(device.torch_device.index or 0, num_chunks, chunk_bytes)
        return cuda_ring, tuple(
            torch.as_tensor(
                _DeviceBytes(cuda_ring.chunk_address(chunk), chunk_bytes),
                device=device.torch_device,
            )
            for chunk in range(num_chunks)
        )
    host_ring = HostRing.create(num_chunks, chunk_bytes)
    return host_ring, tuple(
        torch.frombuffer(host_ring.chunk(chunk), dtype=torch.uint8) for chunk in range(num_chunks)
    )
