"""Over TCP an engine serves those whose keys it has been given, and nobody else."""

import asyncio
import shutil
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq.asyncio

from api.engine_client import EngineClient, Timeouts
from engine.config import EngineConfig
from engine.rpc_listener import RpcListener
from ipc.curve import ClientKeys, create_keys, read_key_pair, read_public_key
from ipc.errors import InvalidRequest, Unauthenticated, Unavailable
from tests.engine.rpc_rig import DEADLINE_S, RpcRig, rpc_rig

TIMEOUTS = Timeouts(handshake_s=5.0, call_s=5.0, load_adapter_s=5.0, token_s=5.0)


@dataclass(frozen=True)
class Keys:
    """A server's pair, the folder of those it lets in, and what one of these presents."""

    server: Path
    allowed: Path
    client: ClientKeys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    _, server = create_keys(tmp_path / "server")
    public, own = create_keys(tmp_path / "client")
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    shutil.copy(public, allowed)
    return Keys(server, allowed, ClientKeys(read_key_pair(own), read_public_key(server)))


def stranger(folder: Path) -> Path:
    return create_keys(folder / "stranger")[1]


def with_remote(
    folder: Path, keys: Keys, body: Callable[[RpcRig], Coroutine[Any, Any, None]]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def run() -> None:
        async with (
            asyncio.timeout(3 * DEADLINE_S),
            rpc_rig(
                folder,
                rpc_bind=f"tcp://127.0.0.1:{port}",
                rpc_key=str(keys.server),
                rpc_client_keys=str(keys.allowed),
            ) as rig,
        ):
            await body(rig)

    uvloop.run(run())


async def connect(rig: RpcRig, keys: ClientKeys | None) -> int:
    """The epoch of the engine that a client with ``keys`` meets over TCP."""
    assert rig.remote_endpoint is not None
    client = EngineClient(rig.context, rig.remote_endpoint, TIMEOUTS, 64, keys)
    running = asyncio.create_task(client.run())
    try:
        return (await client.wait_connected(1.0)).engine_epoch
    finally:
        running.cancel()
        await asyncio.wait((running,))


def test_a_client_with_a_key_is_served_over_tcp_and_one_without_in_the_run_folder(
    tmp_path: Path, keys: Keys
) -> None:
    async def body(rig: RpcRig) -> None:
        assert await connect(rig, keys.client) == 3
        await rig.client(keys.client).hear_nothing_but_pong()
        await rig.client().hear_nothing_but_pong()

    with_remote(tmp_path, keys, body)


def test_a_client_with_an_unknown_key_is_unauthenticated_at_once(
    tmp_path: Path, keys: Keys
) -> None:
    async def body(rig: RpcRig) -> None:
        unknown = replace(keys.client, own=read_key_pair(stranger(tmp_path)))
        with pytest.raises(Unauthenticated, match="does not know this client's key"):
            await connect(rig, unknown)

    with_remote(tmp_path, keys, body)


def test_a_client_that_expects_another_engine_is_unauthenticated_at_once(
    tmp_path: Path, keys: Keys
) -> None:
    async def body(rig: RpcRig) -> None:
        expected = replace(keys.client, engine_public=read_public_key(stranger(tmp_path)))
        with pytest.raises(Unauthenticated, match="another key than the client expects"):
            await connect(rig, expected)

    with_remote(tmp_path, keys, body)


def test_a_client_without_keys_is_not_heard_over_tcp(tmp_path: Path, keys: Keys) -> None:
    async def body(rig: RpcRig) -> None:
        with pytest.raises(Unavailable, match="no engine answered"):
            await connect(rig, None)

    with_remote(tmp_path, keys, body)


def test_a_key_that_is_added_or_taken_away_counts_for_the_next_connection(
    tmp_path: Path, keys: Keys
) -> None:
    async def body(rig: RpcRig) -> None:
        (keys.allowed / "client.key").rename(tmp_path / "away.key")
        with pytest.raises(Unauthenticated):
            await connect(rig, keys.client)
        (tmp_path / "away.key").rename(keys.allowed / "client.key")
        assert await connect(rig, keys.client) == 3

    with_remote(tmp_path, keys, body)


def test_a_taken_port_and_keys_that_can_not_be_read_are_named(tmp_path: Path, keys: Keys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"

        def listen(**fields: Any) -> None:
            fields = {"rpc_key": str(keys.server), "rpc_client_keys": str(keys.allowed)} | fields
            config = EngineConfig(model="", served_model_name="m", rpc_bind=endpoint, **fields)

            async def run() -> None:
                context = zmq.asyncio.Context()
                try:
                    RpcListener(context, f"ipc://{tmp_path / 'rpc'}", config)
                finally:
                    context.destroy(linger=0)

            uvloop.run(run())

        with pytest.raises(Unavailable, match=f"{endpoint}: Address already in use"):
            listen()
        with pytest.raises(InvalidRequest, match="expected a secret key"):
            listen(rpc_key=str(keys.allowed / "client.key"))
        with pytest.raises(InvalidRequest, match="expected a folder"):
            listen(rpc_client_keys=str(keys.server))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rpc_bind": "ipc:///tmp/x"}, "expected tcp://ADDRESS:PORT, got 'ipc:///tmp/x'"),
        ({"rpc_bind": "tcp://0.0.0.0:1"}, "nobody is served over TCP without keys"),
        ({"rpc_bind": "tcp://0.0.0.0:1", "rpc_key": "k"}, "expected --rpc-key and"),
    ],
)
def test_tcp_without_keys_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="", served_model_name="m", **fields)
