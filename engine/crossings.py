"""Every call that crosses from one of the engine's threads to another.

| from   | to     | how                                                          |
|--------|--------|--------------------------------------------------------------|
| I/O    | step   | a command in the core's queue                                |
| I/O    | placer | the placer's mailbox                                         |
| step   | placer | the placer's mailbox                                         |
| step   | I/O    | a callback on the event loop: one a step, one a loader message |
| placer | step   | a command in the core's queue                                |
| placer | I/O    | a callback on the event loop, once a lost loader's ring is free |

None of them waits.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from engine.commands import Command, HostTierUpdated, LoadBroken, LoaderConnected, LoaderLost
from ipc.chunk_channel import ChunkChannel
from ipc.errors import SidestreamError
from ipc.messages import (
    AdapterId,
    ChunkReady,
    ChunkReleased,
    EngineToLoader,
    HostTierChanged,
    LoadFailed,
    LoadSent,
    TokenDelta,
)


class _Core(Protocol):
    def submit(self, command: Command) -> None: ...


class _Placer(Protocol):
    def connect(self, channel: ChunkChannel[ChunkReleased, ChunkReady]) -> None: ...

    def reclaim(self, done: Callable[[], None]) -> None: ...


class _Link(Protocol):
    def send(self, body: EngineToLoader) -> bool: ...


class _Server(Protocol):
    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None: ...


class _Directory(Protocol):
    def host_tier_changed(self, change: HostTierChanged) -> None: ...

    def loader_lost(self) -> None: ...

    def load_failed(self, adapter_id: AdapterId, error: SidestreamError) -> None: ...


class Crossings:
    """Made first, and ``join`` ed once the parts exist: they all refer to each other through it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def join(
        self, core: _Core, placer: _Placer, link: _Link, server: _Server, directory: _Directory
    ) -> None:
        """Must be called before any thread but the I/O thread runs."""
        self._core = core
        self._placer = placer
        self._link = link
        self._server = server
        self._directory = directory

    # --- From any thread --------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """To the step thread."""
        self._core.submit(command)

    # --- From the I/O thread: what the link to the loader reports -----------------------------

    def ring_granted(self, channel: ChunkChannel[ChunkReleased, ChunkReady]) -> None:
        self._placer.connect(channel)

    def loader_connected(self) -> None:
        self._core.submit(LoaderConnected())

    def loader_lost(self, ring_is_free: Callable[[], None]) -> None:
        """The placer takes the chunks back; the step thread gives the loads up in its own time."""
        self._directory.loader_lost()
        self._core.submit(LoaderLost())
        self._placer.reclaim(ring_is_free)

    def load_ended(self, message: LoadSent | LoadFailed) -> None:
        """A failure goes to the step thread; of success it hears when the bytes are in place."""
        if isinstance(message, LoadFailed):
            self._core.submit(LoadBroken(message.load_id, message.error))

    def host_tier_changed(self, change: HostTierChanged) -> None:
        self._directory.host_tier_changed(change)
        self._core.submit(HostTierUpdated(tuple(change.added), tuple(change.removed)))

    # --- From the step thread -----------------------------------------------------------------

    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        """One step's tokens, to the clients."""
        self._loop.call_soon_threadsafe(self._server.deliver, deltas)

    def send_to_loader(self, body: EngineToLoader) -> None:
        """Lost if no loader is connected: residency then hears that it is lost, and starts over."""
        self._loop.call_soon_threadsafe(self._link.send, body)

    def adapter_failed(self, adapter_id: AdapterId, error: SidestreamError) -> None:
        self._loop.call_soon_threadsafe(self._directory.load_failed, adapter_id, error)
