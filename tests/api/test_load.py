"""The frontend's own process under load, before an engine that gives every stream 50 tokens a
second: readers that are many, slow, or gone."""

import asyncio
import re
import socket
import time
from collections.abc import Callable
from time import perf_counter

import msgspec
import pytest
import uvloop

from tests.api.frontend import on_loop
from tools.bench.http_exchange import Address, call
from tools.bench_frontend import (
    MODEL,
    Gaps,
    Load,
    OwnStalls,
    Rig,
    frontend,
    measure,
    read_stream,
)

pytestmark = pytest.mark.timed

TOKENS_PER_S = 50.0
MAX_GAP_MS = 250.0
MiB = 1 << 20


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = perf_counter() + timeout_s
    while not condition():
        assert perf_counter() < deadline_s
        await asyncio.sleep(0.01)


def request(address: Address, max_tokens: int, n: int = 1) -> bytes:
    body = {"model": MODEL, "prompt": "x", "max_tokens": max_tokens, "n": n, "stream": True}
    return address.request("POST", "/v1/completions", msgspec.json.encode(body))


@on_loop
async def test_many_streams_are_passed_on_evenly() -> None:
    report = await measure(Load(128, TOKENS_PER_S, seconds=5.0, tokens_per_stream=75))
    assert report.num_failures == 0 and report.streams_left == 0
    assert report.frontend_gap_max_ms < MAX_GAP_MS, report


@on_loop
async def test_what_this_process_stood_still_for_is_not_the_frontends_and_all_else_is() -> None:
    async with OwnStalls() as stalls:
        gaps = Gaps(stalls)
        await asyncio.sleep(0.02)
        began_s = perf_counter()
        before_s = gaps.stalled_s(began_s)
        time.sleep(0.2)  # The whole loop stands still.
        gaps.add(perf_counter() - began_s, gaps.stalled_s(perf_counter()) - before_s)
        assert gaps.largest_s >= 0.2 and gaps.largest_of_frontend_s < 0.1
        began_s = perf_counter()
        before_s = gaps.stalled_s(began_s)
        await asyncio.sleep(0.15)  # The others go on.
        gaps.add(perf_counter() - began_s, gaps.stalled_s(perf_counter()) - before_s)
        assert gaps.largest_of_frontend_s >= 0.1


@pytest.mark.long
@pytest.mark.timeout(900)
def test_512_streams_are_passed_on_evenly_for_ten_minutes_in_the_same_memory() -> None:
    report = uvloop.run(measure(Load(512, TOKENS_PER_S, seconds=600.0, tokens_per_stream=1_000)))
    print(report)
    assert report.num_failures == 0 and report.streams_left == 0
    assert report.frontend_gap_max_ms < MAX_GAP_MS, report
    assert report.grown_bytes < 8 * MiB, report


@on_loop
async def test_readers_that_stand_still_slow_nobody_and_are_dropped() -> None:
    stalls = OwnStalls()
    gaps = Gaps(stalls)
    async with frontend(TOKENS_PER_S, write_timeout_s=1.0) as rig, stalls:
        stalled = []
        for _ in range(2):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((rig.address.host, rig.address.port))
            # A hundred choices fill every buffer on the way within seconds.
            reader.sendall(request(rig.address, 100_000, n=100))
            stalled.append(reader)
        await until(lambda: rig.engine.num_streams == 200)
        others = [asyncio.create_task(read_stream(rig.address, 150, gaps)) for _ in range(32)]
        assert all(await asyncio.gather(*others))
        await until(lambda: rig.engine.num_streams == 0)
        for reader in stalled:
            reader.close()
    assert gaps.largest_of_frontend_s * 1e3 < MAX_GAP_MS


async def vanish(rig: Rig, how: int) -> None:
    """Connects and is gone: within its request, behind it, or within the answer."""
    loop = asyncio.get_running_loop()
    whole = request(rig.address, 100_000)
    with socket.socket() as client:
        client.setblocking(False)
        # Nothing of a goodbye: the connection is reset.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await loop.sock_connect(client, (rig.address.host, rig.address.port))
        await loop.sock_sendall(client, whole[: len(whole) - 5] if how == 0 else whole)
        if how == 2:
            assert await loop.sock_recv(client, 4096)


@on_loop
async def test_a_thousand_clients_that_vanish_leave_nothing_behind() -> None:
    async with frontend(TOKENS_PER_S) as rig:
        assert await read_stream(rig.address, 3, Gaps())
        before = rig.usage()
        for _ in range(10):
            await asyncio.gather(*(vanish(rig, place % 3) for place in range(100)))
        await until(lambda: rig.engine.num_streams == 0)
        await until(lambda: rig.usage().num_fds <= before.num_fds)
        metrics = (await call(rig.address, "GET", "/metrics")).decode()
        aborted = re.search(r'request_success_total{finished_reason="abort".*} (\d+)', metrics)
        # Whoever had begun to read; of the others some had not been asked for yet.
        assert aborted is not None and 330 <= int(aborted[1]) <= 660
        assert await read_stream(rig.address, 3, Gaps())
        assert rig.usage().resident_bytes - before.resident_bytes < 16 * MiB
