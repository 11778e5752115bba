"""The ring in GPU memory, both of its ends in one process."""

import os

import pytest
import torch

from engine.config import DeviceKind
from engine.device import open_device
from engine.ring import open_ring
from ipc.errors import Unavailable
from ipc.messages import Epoch, RingGrant, RingKind
from loader.host_tier import HostTier

pytestmark = pytest.mark.gpu

CHUNK_BYTES = 2 << 20
SEGMENT_BYTES = 1 << 20


def test_registered_segments_reach_the_ring_byte_for_byte() -> None:
    from ipc.cuda_memory import CudaRegistrar, CudaRingTarget

    ring, chunks = open_ring(open_device(DeviceKind.CUDA), 2, CHUNK_BYTES)
    grant = RingGrant(Epoch(1), RingKind.CUDA, 2, CHUNK_BYTES)
    target = CudaRingTarget(os.dup(ring.fd), grant)
    segments = HostTier(2 * SEGMENT_BYTES, SEGMENT_BYTES).segments()
    registrar = target.host_registrar()
    assert isinstance(registrar, CudaRegistrar)
    payload = os.urandom(2 * SEGMENT_BYTES)
    for index, segment in enumerate(segments):
        registrar.register(segment)
        segment[:] = payload[index * SEGMENT_BYTES : (index + 1) * SEGMENT_BYTES]
    target.write(0, segments)
    target.write(1, reversed(segments))
    target.synchronize(0)
    target.synchronize(1)
    assert bytes(chunks[0].cpu().numpy()) == payload
    assert bytes(chunks[1].cpu().numpy()) == payload[SEGMENT_BYTES:] + payload[:SEGMENT_BYTES]
    target.close()
    registrar.close()
    del chunks
    ring.close()


def test_memory_can_be_registered_again_after_it_was_given_back() -> None:
    from ipc.cuda_memory import CudaRegistrar

    torch.zeros(1, device="cuda")
    (segment,) = HostTier(SEGMENT_BYTES).segments()
    for _ in range(2):
        registrar = CudaRegistrar()
        registrar.register(segment)
        with pytest.raises(Unavailable, match="cuMemHostRegister failed"):
            registrar.register(segment)
        registrar.close()
