"""The engine's half of the conversation, over real sockets, line by line as a test says."""

import asyncio
import contextlib
import select
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from ipc import handover
from ipc.base_model import BaseModel
from ipc.channel import RouterChannel, open_socket
from ipc.chunk_channel import ChunkChannel
from ipc.endpoints import RunFolder
from ipc.messages import (
    AdapterId,
    AdapterSource,
    CallId,
    ChunkReady,
    ChunkReleased,
    EngineHello,
    EngineToLoader,
    Epoch,
    FileIdentity,
    FromEngine,
    FromLoader,
    HostTierChanged,
    Inspect,
    Inspected,
    LoaderHello,
    LoaderToEngine,
    LoadFailed,
    LoadId,
    LoadSent,
    Manifest,
    ReadTiming,
    RingGrant,
    RingKind,
    RingRequest,
    Stage,
)
from ipc.ring_memory import HostRing
from loader.blocks import Block
from loader.config import LoaderConfig
from loader.service import LoaderService

LOADER_EPOCH = Epoch(3)
Message = TypeVar("Message", bound=LoaderToEngine)


@dataclass(frozen=True)
class Ended:
    """What came of one load: its image, and the message that ended it."""

    image: bytes
    message: LoadSent | LoadFailed


class ScriptedEngine:
    """One engine epoch. Belongs to the running loop."""

    def __init__(
        self,
        run_folder: RunFolder,
        base: BaseModel,
        *,
        epoch: int = 1,
        num_chunks: int = 2,
        chunk_bytes: int = 4096,
        ring_kind: RingKind = RingKind.HOST,
        base_files: tuple[FileIdentity, ...] | None = None,
    ) -> None:
        self.epoch = Epoch(epoch)
        self.base = base
        self.base_files = base_files
        self.resident: set[AdapterId] = set()
        self.reads: list[ReadTiming] = []
        self.num_evictions = 0
        self.ring = HostRing.create(num_chunks, chunk_bytes)
        self._kind = ring_kind
        self._context = zmq.asyncio.Context()
        zmq_socket = open_socket(self._context, zmq.ROUTER)
        zmq_socket.bind(run_folder.loader_endpoint)
        self.channel: RouterChannel[FromEngine, FromLoader] = RouterChannel(zmq_socket, FromLoader)
        self._listener = handover.listen(run_folder.handover_path)
        self._chunks: ChunkChannel[ChunkReleased, ChunkReady] | None = None
        self._receiving: asyncio.Future[tuple[bytes, LoaderToEngine]] | None = None
        self.peer = b""
        self._num_calls = 0

    async def grant(self) -> None:
        """Waits for a loader's request and gives it the ring."""
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._listener)
        readable = asyncio.Event()
        loop.add_reader(connection, readable.set)
        await readable.wait()
        loop.remove_reader(connection)
        received = handover.receive(connection)
        assert received == (RingRequest(LOADER_EPOCH), None)
        grant = RingGrant(self.epoch, self._kind, self.ring.num_chunks, self.ring.chunk_bytes)
        handover.send(connection, grant, self.ring.fd)
        self._chunks = ChunkChannel(connection, ChunkReady)

    async def greet(self) -> LoaderHello:
        """Waits for the loader's hello and answers it."""
        self.peer, hello = await self._receive()
        assert isinstance(hello, LoaderHello)
        self.send(EngineHello(self.base, 64, self.base_files))
        return hello

    async def meet(self) -> LoaderHello:
        """The whole handshake; what the host tier holds is known after it."""
        await self.grant()
        hello = await self.greet()
        self.resident = set((await self.next_change()).added)
        return hello

    def send(self, body: EngineToLoader) -> None:
        assert self.channel.send(self.peer, FromEngine(self.epoch, LOADER_EPOCH, body))

    async def _receive(self) -> tuple[bytes, LoaderToEngine]:
        """What this engine must hear; a loader may still be speaking to the one before."""
        while True:
            peer, message = await self.channel.receive()
            assert message.loader_epoch == LOADER_EPOCH
            if message.engine_epoch == self.epoch:
                return peer, message.body

    async def _next_any(self) -> LoaderToEngine | ChunkReady:
        """Of what has come both ways a chunk goes first: the end of its load was sent later."""
        assert self._chunks is not None
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._receive())
        while True:
            if select.select([self._chunks], [], [], 0)[0]:
                chunk = self._chunks.receive()
                assert chunk is not None, "the loader has hung up"
                return chunk
            if self._receiving.done():
                peer, message = self._receiving.result()
                self._receiving = None
                assert peer == self.peer
                return message
            await self._chunk_or(self._receiving)

    async def _chunk_or(self, message: asyncio.Future[tuple[bytes, LoaderToEngine]]) -> None:
        """Returns when there is a chunk or a message, or both."""
        assert self._chunks is not None
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._chunks, came.set)
        chunk = asyncio.ensure_future(came.wait())
        try:
            await asyncio.wait((chunk, message), return_when=asyncio.FIRST_COMPLETED)
        finally:
            chunk.cancel()
            loop.remove_reader(self._chunks)

    async def next(self) -> LoaderToEngine | ChunkReady:
        """The next message; changes of the host tier are noted and skipped."""
        while isinstance(message := await self._next_any(), HostTierChanged):
            self._note(message)
        return message

    async def next_change(self) -> HostTierChanged:
        """The next message, a change of the host tier."""
        message = await self._next_any()
        assert isinstance(message, HostTierChanged), message
        self._note(message)
        return message

    async def until_resident(self, *adapter_ids: int) -> None:
        """Waits until the host tier holds exactly these."""
        while self.resident != set(adapter_ids):
            await self.next_change()

    def _note(self, change: HostTierChanged) -> None:
        self.reads += change.reads
        self.num_evictions += change.num_evictions
        self.resident = (self.resident | set(change.added)) - set(change.removed)

    async def call(self, make: Callable[[CallId], EngineToLoader]) -> LoaderToEngine | ChunkReady:
        """The answer to one call."""
        self._num_calls += 1
        self.send(make(CallId(self._num_calls)))
        return await self.next()

    async def inspect(self, adapter_id: int, path: Path | str) -> Manifest:
        """The manifest of an adapter that is as it should be."""
        answer = await self.call(lambda call: Inspect(call, AdapterId(adapter_id), str(path)))
        assert isinstance(answer, Inspected), answer
        return answer.manifest

    async def source(self, adapter_id: int, path: Path | str) -> AdapterSource:
        manifest = await self.inspect(adapter_id, path)
        return AdapterSource(manifest.path, manifest.generation)

    def stage(self, load_id: int, source: AdapterSource) -> None:
        self.send(Stage(LoadId(load_id), source))

    def release(self, chunk: ChunkReady) -> None:
        assert self._chunks is not None
        assert self._chunks.send(ChunkReleased(chunk.chunk))

    def take(self, chunk: ChunkReady) -> bytes:
        """Copies a chunk out of the ring and gives it back."""
        payload = bytes(self.ring.chunk(chunk.chunk)[: chunk.num_bytes])
        self.release(chunk)
        return payload

    async def collect(self, *load_ids: int, others_may_speak: bool = False) -> dict[int, Ended]:
        """Takes chunks until each of these loads has ended; keys are in the order of the ends.

        Others are loads that were cancelled: what had been sent of them is given back.
        """
        images = {load_id: b"" for load_id in load_ids}
        ended: dict[int, Ended] = {}
        while len(ended) < len(images):
            match await self.next():
                case ChunkReady() | LoadSent() | LoadFailed() as message if (
                    others_may_speak and message.load_id not in images
                ):
                    if isinstance(message, ChunkReady):
                        self.take(message)
                case ChunkReady(load_id, _, offset) as chunk:
                    assert load_id not in ended and offset == len(images[load_id])
                    images[load_id] += self.take(chunk)
                case LoadSent(load_id) | LoadFailed(load_id) as message:
                    ended[load_id] = Ended(images[load_id], message)
                case other:
                    raise AssertionError(other)
        return ended

    def close(self) -> None:
        """Dies: every socket is closed at once."""
        self._listener.close()
        if self._chunks is not None:
            self._chunks.close()
        if self._receiving is not None:
            self._receiving.cancel()
        self.channel.close()
        self._context.destroy(linger=0)
        self.ring.close()


@contextlib.asynccontextmanager
async def serving(
    run_folder: RunFolder,
    roots: Path,
    *,
    host_tier_bytes: int = 1 << 20,
    read_block_bytes: int = 4 << 20,
    num_read_threads: int = 2,
    model: str | None = None,
    row_scale_cache: str | None = None,
    adapter_sources: tuple[str, ...] = (),
    adapter_cache: str | None = None,
    before_block: Callable[[Block], None] | None = None,
    **options: Any,
) -> AsyncIterator[LoaderService]:
    """A loader that serves in this loop; at the end it must stop by itself."""
    config = LoaderConfig(
        host_tier_bytes=host_tier_bytes,
        adapter_roots=(str(roots),),
        lora_dir=str(roots),
        model=model,
        row_scale_cache=row_scale_cache,
        adapter_sources=adapter_sources,
        adapter_cache=adapter_cache,
        num_read_threads=num_read_threads,
        read_block_bytes=read_block_bytes,
    )
    service = LoaderService(config, LOADER_EPOCH, run_folder, before_block, **options)
    stop = asyncio.Event()
    task = asyncio.create_task(service.run(stop))
    try:
        yield service
    finally:
        stop.set()
        await task
