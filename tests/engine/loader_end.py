"""A loader in the test's own process: writes into the ring's chunks and speaks for them."""

import select
import socket

import torch

from engine.device import Device
from ipc.chunk_channel import ChunkChannel
from ipc.messages import ChunkReady, ChunkReleased, LoadId

DEADLINE_S = 10.0


class LoaderEnd:
    """Owns the ring's memory and its own end of the connection.

    ``engine_end`` is the placer's, to be connected to it.
    """

    def __init__(self, device: Device, num_chunks: int, chunk_bytes: int, fill: int = 0) -> None:
        self.ring = tuple(
            torch.full((chunk_bytes,), fill, dtype=torch.uint8, device=device.torch_device)
            for _ in range(num_chunks)
        )
        self._device = device
        self._free = list(range(num_chunks))
        self.connect()

    def connect(self) -> None:
        """A new connection, as after a grant; what was announced on the one before is void."""
        loader, engine = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = loader
        self._channel: ChunkChannel[ChunkReady, ChunkReleased]
        self._channel = ChunkChannel(loader, ChunkReleased)
        self.engine_end: ChunkChannel[ChunkReleased, ChunkReady] = ChunkChannel(engine, ChunkReady)
        self._free = list(range(len(self.ring)))

    def send(self, load_id: int, image: bytes, offset: int, num_bytes: int | None = None) -> int:
        """Puts a piece of the image into a free chunk, waiting for one, and announces it."""
        while not self._free:
            self._hear()
        chunk = self._free.pop(0)
        memory = self.ring[chunk]
        piece = image[offset : offset + (memory.numel() if num_bytes is None else num_bytes)]
        memory[: len(piece)].copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
        # As the loader does before it announces a chunk. The engine's streams are not waited for.
        if self._device.torch_device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.announce(ChunkReady(LoadId(load_id), chunk, offset, len(piece)))
        return chunk

    def send_all(self, load_id: int, image: bytes, start: int = 0) -> None:
        """All of the image from ``start`` on, in full chunks."""
        for offset in range(start, len(image), self.ring[0].numel()):
            self.send(load_id, image, offset)

    def announce(self, chunk: ChunkReady) -> None:
        assert self._channel.send(chunk)

    def say(self, payload: bytes) -> None:
        """What no loader should."""
        self._socket.send(payload)

    def wait_until_all_are_free(self) -> None:
        while len(self._free) < len(self.ring):
            self._hear()

    def has_nothing_to_hear(self) -> bool:
        return not select.select([self._channel], [], [], 0)[0]

    def hears_the_end(self) -> bool:
        """Waits for what comes next: whether it is the end."""
        assert select.select([self._channel], [], [], DEADLINE_S)[0]
        return self._channel.receive() is None

    def close(self) -> None:
        self._channel.close()

    def _hear(self) -> None:
        assert select.select([self._channel], [], [], DEADLINE_S)[0], "no chunk is given back"
        released = self._channel.receive()
        assert released is not None, "the engine has hung up"
        assert released.chunk not in self._free, f"chunk {released.chunk} is given back twice"
        self._free.append(released.chunk)
