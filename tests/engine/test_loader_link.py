"""Who may write into the ring: the link to the loader, driven by a scripted one."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from engine.loader_link import LoaderLink
from ipc import handover
from ipc.base_model import BaseModel, DType
from ipc.channel import Channel, open_socket
from ipc.chunk_channel import ChunkChannel
from ipc.errors import AdapterInvalid, DeadlineExceeded
from ipc.messages import (
    AdapterId,
    CallId,
    ChunkReady,
    ChunkReleased,
    EngineHello,
    Epoch,
    FromEngine,
    FromLoader,
    HostTierChanged,
    Inspect,
    LoaderCallFailed,
    LoaderHello,
    LoaderProcess,
    LoaderToEngine,
    LoadFailed,
    LoadId,
    LoadSent,
    RingGrant,
    RingKind,
    RingRequest,
)

ENGINE_EPOCH = Epoch(7)
DEADLINE_S = 10.0


class Events:
    """Writes down what the link told the engine; gives the ring back when the test says so."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.channels: list[ChunkChannel[ChunkReleased, ChunkReady]] = []
        self.give_back: Callable[[], None] | None = None

    def loader_connected(self) -> None:
        self.log.append("connected")

    def ring_granted(self, channel: ChunkChannel[ChunkReleased, ChunkReady]) -> None:
        self.channels.append(channel)

    def loader_lost(self, ring_is_free: Callable[[], None]) -> None:
        self.log.append("lost")
        self.give_back = ring_is_free

    def load_ended(self, message: LoadSent | LoadFailed) -> None:
        self.log.append(f"ended {message.load_id}")

    def host_tier_changed(self, change: HostTierChanged) -> None:
        self.log.append(f"host tier {change.used_bytes}")


class ScriptedLoader:
    """A process that only lives and dies, with this test speaking for it."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self.epoch = Epoch(epoch)
        self._folder = folder
        self._process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        self._ring: socket.socket | None = None
        self._socket: zmq.asyncio.Socket | None = None

    def announce(self) -> None:
        """What the supervisor does: hands the engine the pidfd."""
        supervisor = handover.connect(self._folder / "handover.sock", DEADLINE_S)
        pidfd = os.pidfd_open(self._process.pid)
        handover.send(supervisor, LoaderProcess(self.epoch), pidfd)
        os.close(pidfd)
        supervisor.close()

    def request_ring(self) -> None:
        self._ring = handover.connect(self._folder / "handover.sock", DEADLINE_S)
        handover.send(self._ring, RingRequest(self.epoch))

    async def granted(self) -> RingGrant:
        assert self._ring is not None
        received = await asyncio.to_thread(handover.receive, self._ring)
        assert received is not None
        grant, fd = received
        assert isinstance(grant, RingGrant) and fd is not None
        os.close(fd)
        return grant

    def has_no_grant(self) -> bool:
        assert self._ring is not None
        self._ring.setblocking(False)
        try:
            self._ring.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self._ring.settimeout(DEADLINE_S)
        return False

    def connect(self, context: zmq.asyncio.Context) -> None:
        self._socket = open_socket(context, zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, b"loader-%d" % self.epoch)
        self._socket.connect(f"ipc://{self._folder / 'loader.sock'}")
        self.channel: Channel[FromLoader, FromEngine] = Channel(self._socket, FromEngine)

    def say(self, body: LoaderToEngine, engine_epoch: int = ENGINE_EPOCH) -> None:
        self.channel.send(FromLoader(Epoch(engine_epoch), self.epoch, body))

    async def join(self, context: zmq.asyncio.Context) -> None:
        """The whole handshake."""
        self.announce()
        self.request_ring()
        await self.granted()
        self.connect(context)
        self.say(LoaderHello(1024))
        assert isinstance((await self.channel.receive()).body, EngineHello)

    def announce_chunk(self, chunk: ChunkReady) -> None:
        assert self._ring is not None
        self._ring.send(msgspec.msgpack.encode(chunk))

    def hang_up(self) -> None:
        """Its connection ends; the process lives on."""
        assert self._ring is not None
        self._ring.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._ring is not None:
            self._ring.close()
        if self._socket is not None:
            self._socket.close()


Body = Callable[[LoaderLink, Events, zmq.asyncio.Context, Path], Awaitable[None]]


def with_link(folder: Path, body: Body) -> None:
    async def run() -> None:
        context = zmq.asyncio.Context()
        events = Events()
        ring_fd = os.memfd_create("ring")
        grant = RingGrant(ENGINE_EPOCH, RingKind.HOST, 4, 4096)
        base = BaseModel("LlamaForCausalLM", 1, 8, 16, 1, 1, DType.FLOAT32, ())
        link = LoaderLink(
            context,
            folder / "handover.sock",
            f"ipc://{folder / 'loader.sock'}",
            ring_fd,
            grant,
            EngineHello(base, 64),
            events,
        )
        serving = asyncio.create_task(link.run())
        try:
            await asyncio.wait_for(body(link, events, context, folder), 3 * DEADLINE_S)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            link.close()
            for channel in events.channels:
                channel.close()
            os.close(ring_fd)
            context.term()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_loader_is_connected_after_the_whole_handshake(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        loader = ScriptedLoader(folder, 1)
        await loader.join(context)
        assert link.connected
        assert events.log == ["connected"]
        loader.kill()

    with_link(tmp_path, body)


def test_a_process_that_the_supervisor_did_not_name_gets_no_ring(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        stranger, loader = ScriptedLoader(folder, 5), ScriptedLoader(folder, 1)
        stranger.request_ring()
        await loader.join(context)
        assert stranger.has_no_grant()
        stranger.kill()
        loader.kill()

    with_link(tmp_path, body)


def test_a_new_loader_gets_the_ring_only_when_no_copy_reads_it(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        first, second = ScriptedLoader(folder, 1), ScriptedLoader(folder, 2)
        await first.join(context)
        second.announce()
        second.request_ring()
        assert link.connected
        first.kill()
        await until(lambda: events.give_back is not None)
        assert not link.connected
        assert second.has_no_grant()
        assert events.give_back is not None
        events.give_back()
        await second.granted()
        second.kill()

    with_link(tmp_path, body)


def test_messages_of_other_epochs_are_dropped_and_counted(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        loader, older = ScriptedLoader(folder, 2), ScriptedLoader(folder, 1)
        await loader.join(context)
        older.connect(context)
        error = AdapterInvalid("of another epoch").info
        older.say(LoadFailed(LoadId(1), error))
        loader.say(LoadFailed(LoadId(2), error), engine_epoch=6)
        await until(lambda: link.num_stale_messages == 2)
        loader.say(LoadFailed(LoadId(3), error))
        await until(lambda: "ended 3" in events.log)
        assert events.log == ["connected", "ended 3"]
        older.kill()
        loader.kill()

    with_link(tmp_path, body)


def test_chunks_come_over_the_connection_that_the_ring_was_granted_on(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        loader = ScriptedLoader(folder, 1)
        await loader.join(context)
        (channel,) = events.channels
        loader.announce_chunk(ChunkReady(LoadId(3), 2, 0, 4096))
        assert channel.receive() == ChunkReady(LoadId(3), 2, 0, 4096)
        loader.kill()

    with_link(tmp_path, body)


def test_a_loader_that_asks_for_the_ring_again_gets_it_once_its_copies_are_over(
    tmp_path: Path,
) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        loader = ScriptedLoader(folder, 1)
        await loader.join(context)
        loader.hang_up()
        loader.request_ring()
        await until(lambda: "lost" in events.log)
        assert loader.has_no_grant()
        assert events.give_back is not None
        events.give_back()
        await loader.granted()
        assert len(events.channels) == 2
        loader.kill()

    with_link(tmp_path, body)


def test_a_call_outlives_the_loader_that_it_was_put_to(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        first, second = ScriptedLoader(folder, 1), ScriptedLoader(folder, 2)
        await first.join(context)
        call = asyncio.create_task(
            link.call(lambda call_id: Inspect(call_id, AdapterId(1), "/adapter"), DEADLINE_S)
        )
        assert isinstance((await first.channel.receive()).body, Inspect)
        first.kill()
        await until(lambda: events.give_back is not None)
        assert events.give_back is not None
        events.give_back()
        await second.join(context)
        asked_again = (await second.channel.receive()).body
        assert isinstance(asked_again, Inspect)
        second.say(LoaderCallFailed(asked_again.call_id, AdapterInvalid("rank is 0").info))
        with pytest.raises(AdapterInvalid, match="rank is 0"):
            await call
        second.kill()

    with_link(tmp_path, body)


def test_a_call_without_a_loader_ends_with_its_deadline(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
            await link.call(lambda call_id: Inspect(call_id, AdapterId(1), "/a"), 0.05)

    with_link(tmp_path, body)


def test_an_answer_to_nobody_is_ignored(tmp_path: Path) -> None:
    async def body(
        link: LoaderLink, events: Events, context: zmq.asyncio.Context, folder: Path
    ) -> None:
        loader = ScriptedLoader(folder, 1)
        await loader.join(context)
        loader.say(LoaderCallFailed(CallId(99), AdapterInvalid("late").info))
        loader.say(HostTierChanged([], [], 5))
        await until(lambda: "host tier 5" in events.log)
        loader.kill()

    with_link(tmp_path, body)
