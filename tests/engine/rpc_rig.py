"""The engine's side of the RPC service, before a step thread and adapters that the test plays.

``RawClient`` speaks to it as any language's client would: maps of msgpack, one frame each.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import zmq
import zmq.asyncio

from engine.adapters import AdapterDirectory
from engine.client_calls import ClientCalls, EngineIdentity
from engine.commands import AddRequest, Command, TakeSnapshot
from engine.config import EngineConfig
from engine.loader_link import LoaderLink
from engine.rpc_listener import RpcListener
from engine.server import EngineServer
from engine.stats import Capacities
from engine.validation import RequestLimits
from ipc.curve import ClientKeys, connect_with
from ipc.errors import AdapterNotFound
from ipc.messages import (
    AdapterId,
    AdapterStatus,
    Epoch,
    FinishReason,
    RequestId,
    Residency,
    TokenDelta,
)

DEADLINE_S = 10.0


class PlayedDirectory:
    """The adapters that there are; one that is called ``slow`` takes until ``found``."""

    def __init__(self) -> None:
        self.known = {"a": AdapterId(1)}
        self.found = asyncio.Event()
        self.loads: list[str] = []

    def find(self, name: str) -> AdapterId | None:
        if name == "slow":
            return None
        if name not in self.known:
            raise AdapterNotFound(f"no adapter is called {name!r}", param="model")
        return self.known[name]

    async def resolve(self, name: str) -> AdapterId:
        await self.found.wait()
        return AdapterId(7)

    async def load(self, name: str, path: str, pinned: bool, replace: bool) -> AdapterStatus:
        if name == "broken":
            raise RuntimeError("a defect")
        await self.found.wait()
        self.loads.append(name)
        return AdapterStatus(name, path, AdapterId(8), pinned, Residency.DISK)

    def unload(self, name: str) -> None:
        self.find(name)
        del self.known[name]


@dataclass
class PlayedLink:
    connected: bool = True
    num_stale_messages: int = 0


@dataclass
class RpcRig:
    """``commands`` is what the step thread was asked, less snapshots, of which it takes none."""

    server: EngineServer
    directory: PlayedDirectory
    endpoint: str
    context: zmq.asyncio.Context
    remote_endpoint: str | None = None
    commands: list[Command] = field(default_factory=list)
    clients: list["RawClient"] = field(default_factory=list)

    def step(self, *deltas: TokenDelta) -> None:
        """One step's tokens for the only client that has requests."""
        clients = {command.client for command in self.commands if isinstance(command, AddRequest)}
        (client,) = clients
        self.server.deliver({client: list(deltas)})

    def client(self, keys: ClientKeys | None = None) -> "RawClient":
        """A new client, at the TCP endpoint if it has keys."""
        endpoint = self.endpoint if keys is None else self.remote_endpoint
        assert endpoint is not None
        client = RawClient(self.context, endpoint, keys)
        self.clients.append(client)
        return client

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.001)

    async def until_asked(self, kind: type[Command], count: int = 1) -> Any:
        """The ``count`` th command of a kind, once it is there."""

        def asked() -> list[Command]:
            return [command for command in self.commands if isinstance(command, kind)]

        await self.until(lambda: len(asked()) >= count)
        return asked()[count - 1]


class RawClient:
    """Sends maps, or any bytes; ``hear`` gives back maps."""

    def __init__(
        self, context: zmq.asyncio.Context, endpoint: str, keys: ClientKeys | None
    ) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        if keys is not None:
            connect_with(self._socket, keys)
        self._socket.connect(endpoint)

    async def say(self, **message: Any) -> None:
        await self.say_raw(msgspec.msgpack.encode(message))

    async def say_raw(self, *frames: bytes) -> None:
        await self._socket.send_multipart(frames)

    async def generate(self, request_id: str, **fields: Any) -> None:
        message = {"request_id": request_id, "prompt_token_ids": [1, 2], "sampling": {}}
        await self.say(type="generate", **message | fields)

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(DEADLINE_S):
            answer = msgspec.msgpack.decode(await self._socket.recv())
        assert isinstance(answer, dict)
        return answer

    async def hear_delta(self) -> dict[str, Any]:
        """The only delta of a ``step_outputs``."""
        answer = await self.hear()
        assert answer["type"] == "step_outputs", answer
        (delta,) = answer["deltas"]
        return cast("dict[str, Any]", delta)

    async def hear_nothing_but_pong(self) -> None:
        await self.say(type="ping")
        assert await self.hear() == {"type": "pong"}

    def close(self) -> None:
        self._socket.close()


def token(request_id: str, *tokens: int, last: bool = False) -> TokenDelta:
    reason = FinishReason.LENGTH if last else None
    return TokenDelta(RequestId(request_id), list(tokens), finish_reason=reason)


@contextlib.asynccontextmanager
async def rpc_rig(folder: Path, **fields: Any) -> AsyncIterator[RpcRig]:
    """``fields`` are the engine's configuration's."""
    context = zmq.asyncio.Context()
    endpoint = f"ipc://{folder / 'rpc'}"
    config = EngineConfig(model="", served_model_name="m", **fields)
    listener = RpcListener(context, endpoint, config)
    directory, link = PlayedDirectory(), PlayedLink()
    commands: list[Command] = []

    def submit(command: Command) -> None:
        if not isinstance(command, TakeSnapshot):
            commands.append(command)

    interval_s = config.heartbeat_interval_s
    adapters = cast("AdapterDirectory", directory)
    calls = ClientCalls(
        EngineIdentity("LlamaForCausalLM", 100, 1000, (2,), interval_s),
        Capacities(Epoch(3), 10, 1000),
        adapters,
        cast("LoaderLink", link),
        submit,
    )
    server = EngineServer(
        listener.socket,
        calls,
        RequestLimits(vocab_size=100, max_model_len=1000, kv_tokens=1000),
        adapters,
        submit,
        config.max_unread_tokens,
        interval_s,
    )
    serving = asyncio.create_task(server.run())
    rig = RpcRig(server, directory, endpoint, context, config.rpc_bind, commands)
    try:
        yield rig
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        for client in rig.clients:
            client.close()
        server.close()
        listener.close()
        context.destroy(linger=0)
