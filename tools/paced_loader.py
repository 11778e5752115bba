"""A loader that announces chunks at a set rate and moves no bytes: a child of ``bench_chunks``.

What the ring holds is placed as it is. So the engine's part of a load can be measured by itself,
also on a machine that could not copy at such a rate.
"""

import select
import sys
import time
from collections import deque
from dataclasses import dataclass

import msgspec
import zmq

from ipc import handover
from ipc.channel import HIGH_WATER_MARK
from ipc.chunk_channel import ChunkChannel
from ipc.messages import (
    ChunkReady,
    ChunkReleased,
    FromEngine,
    FromLoader,
    LoaderHello,
    LoaderToEngine,
    LoadId,
    LoadSent,
    LoadTiming,
    RingGrant,
    RingRequest,
    Stage,
)
from ipc.process import adopt

_CONNECT_TIMEOUT_S = 30.0
_NO_TIMING = LoadTiming(queue_s=0.0, copy_s=0.0, num_bytes=0, from_host_tier=True)


class PacedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``chunks_per_s`` 0: as fast as they are given back. Every image is ``image_bytes`` long."""

    chunks_per_s: float
    image_bytes: int


@dataclass(slots=True)
class _Load:
    load_id: LoadId
    next_byte: int = 0


def main() -> int:
    """Ends with its parent, or with the engine's connection."""
    child = adopt(PacedConfig)
    connection = handover.connect(child.run_folder.handover_path, _CONNECT_TIMEOUT_S)
    handover.send(connection, RingRequest(child.epoch))
    received = handover.receive(connection)
    assert received is not None
    grant, _ = received
    assert isinstance(grant, RingGrant)
    chunks: ChunkChannel[ChunkReady, ChunkReleased] = ChunkChannel(connection, ChunkReleased)

    context = zmq.Context()
    engine = context.socket(zmq.DEALER)
    engine.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    engine.setsockopt(zmq.LINGER, 0)
    engine.setsockopt(zmq.ROUTING_ID, b"paced")
    engine.connect(child.run_folder.loader_endpoint)
    encoder = msgspec.msgpack.Encoder()
    decoder = msgspec.msgpack.Decoder(FromEngine)

    def say(body: LoaderToEngine) -> None:
        engine.send(encoder.encode(FromLoader(grant.engine_epoch, child.epoch, body)))

    say(LoaderHello(0))
    poll = zmq.Poller()
    poll.register(engine, zmq.POLLIN)
    poll.register(chunks, zmq.POLLIN)
    loads: deque[_Load] = deque()
    free = deque(range(grant.num_chunks))
    period_s = 1 / child.config.chunks_per_s if child.config.chunks_per_s else 0.0
    due_s = time.perf_counter()
    while True:
        for ready, _ in poll.poll(0 if loads and free else None):
            if ready is engine:
                body = decoder.decode(engine.recv()).body
                if isinstance(body, Stage):
                    loads.append(_Load(body.load_id))
            else:
                released = chunks.receive()
                if released is None:
                    return 0
                free.append(released.chunk)
        if not loads or not free:
            continue
        while (early_s := due_s - time.perf_counter()) > 0:
            select.select([], [], [], early_s)
        # What was missed for want of a chunk is not made up for by a burst.
        due_s = max(due_s + period_s, time.perf_counter())
        load = loads[0]
        num_bytes = min(grant.chunk_bytes, child.config.image_bytes - load.next_byte)
        chunks.send(ChunkReady(load.load_id, free.popleft(), load.next_byte, num_bytes))
        load.next_byte += num_bytes
        if load.next_byte == child.config.image_bytes:
            loads.popleft()
            say(LoadSent(load.load_id, _NO_TIMING))


if __name__ == "__main__":
    sys.exit(main())
