"""How evenly the frontend passes tokens on: ``python -m tools.bench_frontend``.

Starts the frontend's own process before an engine without a model (``tools.paced_engine``) and
reads many streams of it over HTTP, each begun anew when it ends. Tells how long the gaps between a
stream's events were, over the engine's beat; how much of a core a token took; and whether the
frontend's memory grew. The engine and the readers share this process: its own lag is told, too.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from api.config import ApiConfig
from ipc.endpoints import RunFolder
from ipc.messages import Epoch
from tools.bench.http_exchange import Address, exchange
from tools.bench.loop_lag import LoopLag
from tools.child import Child, ChildSpec
from tools.paced_engine import PacedEngine
from tools.tiny_model.tokenizer import VOCAB_SIZE, save_tokenizer

MODEL = "base"
_TOKEN_ID = ord("a")
_HISTOGRAM_MS = 5_000
_END_BYTES = 512
# By then every stream runs, and caches and allocators have what they keep.
_WARM_UP_SHARE = 0.2
_TICK_S = 0.005
_LEAST_STALL_S = 0.05


class OwnStalls:
    """For how long this process's loop stood still, in sum, within ``async with``.

    Of a stall of the machine's the frontend can not be blamed: neither the engine nor any reader,
    which are here, did anything meanwhile. Short ones are the work of the loop, and not counted.
    """

    def __init__(self) -> None:
        self._stalled_s = 0.0
        self._ticked_s = perf_counter()
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._ticked_s = perf_counter()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._ticking is not None
        self._ticking.cancel()
        await asyncio.wait((self._ticking,))

    def until(self, now_s: float) -> float:
        """The sum up to ``now_s``, which is now: also what no tick has told yet."""
        return self._stalled_s + self._stall(now_s)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = perf_counter()
            self._stalled_s += self._stall(now_s)
            self._ticked_s = now_s

    def _stall(self, now_s: float) -> float:
        late_s = now_s - self._ticked_s - _TICK_S
        return late_s if late_s > _LEAST_STALL_S else 0.0


@dataclass
class Gaps:
    """Counts of gaps by whole milliseconds; the last counts all longer ones.

    ``largest_of_frontend_s`` is the largest less the stalls of this process within each.
    """

    stalls: OwnStalls | None = None
    counts: list[int] = field(default_factory=lambda: [0] * _HISTOGRAM_MS)
    largest_s: float = 0.0
    largest_of_frontend_s: float = 0.0

    def stalled_s(self, now_s: float) -> float:
        """To be told at a gap's begin, for its end."""
        return 0.0 if self.stalls is None else self.stalls.until(now_s)

    def add(self, gap_s: float, own_stall_s: float = 0.0) -> None:
        self.counts[min(int(gap_s * 1e3), _HISTOGRAM_MS - 1)] += 1
        self.largest_s = max(self.largest_s, gap_s)
        self.largest_of_frontend_s = max(self.largest_of_frontend_s, gap_s - own_stall_s)

    def percentile_ms(self, share: float) -> int:
        """The millisecond that so large a share of the gaps does not go beyond; 0 of none."""
        left = share * sum(self.counts)
        for milliseconds, count in enumerate(self.counts):
            left -= count
            if left <= 0:
                return milliseconds
        return _HISTOGRAM_MS


@dataclass(frozen=True)
class Usage:
    """What a process has taken of the machine up to now."""

    cpu_s: float
    resident_bytes: int
    num_fds: int

    @classmethod
    def of(cls, pid: int) -> "Usage":
        # Behind the name, which is in parentheses and may have spaces, comes the third field.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(
            ticks / os.sysconf("SC_CLK_TCK"),
            pages * os.sysconf("SC_PAGE_SIZE"),
            len(os.listdir(f"/proc/{pid}/fd")),
        )


@dataclass(frozen=True)
class Load:
    """``tokens_per_stream`` at ``tokens_per_s`` each, then the stream is begun anew."""

    num_streams: int
    tokens_per_s: float
    seconds: float
    tokens_per_stream: int


@dataclass(frozen=True)
class Report:
    """``grown_bytes`` is the frontend's memory at the end over that when it was warm.

    ``frontend_gap_max_ms`` is the largest gap without the time for which this process stood still.
    """

    num_streams: int
    tokens_per_s: float
    seconds: float
    num_pieces: int
    num_failures: int
    gap_p50_ms: int
    gap_p99_ms: int
    gap_max_ms: float
    frontend_gap_max_ms: float
    own_lag_max_ms: float
    frontend_cores: float
    resident_bytes: int
    grown_bytes: int
    streams_left: int


@dataclass(frozen=True)
class Rig:
    """A frontend's process that serves at ``address``, and the engine behind it."""

    address: Address
    engine: PacedEngine
    pid: int

    def usage(self) -> Usage:
        return Usage.of(self.pid)


@contextlib.asynccontextmanager
async def frontend(tokens_per_s: float, **config_fields: Any) -> AsyncIterator[Rig]:
    """A frontend before an engine of ``tokens_per_s`` beats a second. Must be on the main thread.

    Raises:
        Unavailable: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="sidestream-bench-") as model:
        save_tokenizer(Path(model))
        run_folder = RunFolder.create([Path(tempfile.gettempdir())])
        config = ApiConfig(model=model, served_model_name=MODEL, port=0, **config_fields)
        spec = ChildSpec("api", (sys.executable, "-m", "api"), config)
        try:
            async with PacedEngine(
                run_folder.rpc_endpoint, tokens_per_s, VOCAB_SIZE, _TOKEN_ID
            ) as engine:
                child = Child(spec, Epoch(1), run_folder.path, "WARNING")
                try:
                    address = Address.parse(f"http://{await child.started()}")
                    yield Rig(address, engine, child.pid)
                finally:
                    await child.stop()
                    child.close()
        finally:
            run_folder.leave()


async def measure(load: Load) -> Report:
    """Puts ``load`` on a frontend of its own. Raises as ``frontend``."""
    stalls, lag = OwnStalls(), LoopLag()
    gaps = Gaps(stalls)
    num_failures = 0

    async def read_streams(rig: Rig, place: int) -> None:
        nonlocal num_failures
        # Streams that all end in one moment are no workload.
        max_tokens = 1 + load.tokens_per_stream * (place + 1) // load.num_streams
        while True:
            if not await read_stream(rig.address, max_tokens, gaps):
                num_failures += 1
            max_tokens = load.tokens_per_stream

    async with frontend(load.tokens_per_s) as rig, stalls:
        readers = [
            asyncio.create_task(read_streams(rig, place)) for place in range(load.num_streams)
        ]
        lag.start()
        try:
            await asyncio.sleep(load.seconds * _WARM_UP_SHARE)
            warm, began_s = rig.usage(), perf_counter()
            await asyncio.sleep(load.seconds * (1 - _WARM_UP_SHARE))
            end, took_s = rig.usage(), perf_counter() - began_s
        finally:
            lag.stop()
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)
        own_lag_s = max(rig.engine.largest_lag_s, max(lag.lags_us) / 1e6)
        streams_left = await _count_left(rig.engine)
    return Report(
        num_streams=load.num_streams,
        tokens_per_s=load.tokens_per_s,
        seconds=load.seconds,
        num_pieces=sum(gaps.counts),
        num_failures=num_failures,
        gap_p50_ms=gaps.percentile_ms(0.5),
        gap_p99_ms=gaps.percentile_ms(0.99),
        gap_max_ms=round(gaps.largest_s * 1e3, 1),
        frontend_gap_max_ms=round(gaps.largest_of_frontend_s * 1e3, 1),
        own_lag_max_ms=round(own_lag_s * 1e3, 1),
        frontend_cores=round((end.cpu_s - warm.cpu_s) / took_s, 3),
        resident_bytes=end.resident_bytes,
        grown_bytes=end.resident_bytes - warm.resident_bytes,
        streams_left=streams_left,
    )


async def read_stream(address: Address, max_tokens: int, gaps: Gaps) -> bool:
    """Adds the gaps of one stream; whether it had all of its tokens and its end."""
    body = {
        "model": MODEL,
        "prompt": "x",
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = address.request("POST", "/v1/completions", msgspec.json.encode(body))
    last_s: float | None = None
    last_stalled_s = 0.0
    end = b""

    def take(piece: bytes, now_s: float) -> None:
        nonlocal last_s, last_stalled_s, end
        stalled_s = gaps.stalled_s(now_s)
        if last_s is not None:
            gaps.add(now_s - last_s, stalled_s - last_stalled_s)
        last_s, last_stalled_s = now_s, stalled_s
        # The usage is what stands before the end of the stream.
        end = (end + piece)[-_END_BYTES:]

    await exchange(address, request, take)
    return f'"completion_tokens":{max_tokens},'.encode() in end and b"[DONE]" in end


async def _count_left(engine: PacedEngine, timeout_s: float = 5.0) -> int:
    """How many requests are open still, that long after every client has gone."""
    deadline_s = perf_counter() + timeout_s
    while engine.num_streams and perf_counter() < deadline_s:
        await asyncio.sleep(0.01)
    return engine.num_streams


def table(report: Report) -> Table:
    """The report, to be read."""
    shown = Table(title=f"{report.num_streams} streams of {report.tokens_per_s:g} tokens a second")
    shown.add_column("figure")
    shown.add_column("measured", justify="right")
    beat_ms = 1e3 / report.tokens_per_s
    per_token_us = 1e6 * report.frontend_cores / (report.num_streams * report.tokens_per_s)
    for name, value in (
        ("pieces read", f"{report.num_pieces:,}"),
        ("streams that failed", f"{report.num_failures}"),
        ("gap over the engine's beat, p50", f"{report.gap_p50_ms / beat_ms:.2f}"),
        ("gap over the engine's beat, p99", f"{report.gap_p99_ms / beat_ms:.2f}"),
        ("largest gap", f"{report.gap_max_ms:.0f} ms"),
        ("the same less own stalls", f"{report.frontend_gap_max_ms:.0f} ms"),
        ("largest lag of engine and readers themselves", f"{report.own_lag_max_ms:.0f} ms"),
        ("cores that the frontend took", f"{report.frontend_cores:.2f}"),
        ("core time for a token", f"{per_token_us:.1f} µs"),
        ("frontend's memory", f"{report.resident_bytes / 2**20:.0f} MiB"),
        ("of it since it was warm", f"{report.grown_bytes / 2**20:+.1f} MiB"),
        ("requests left when every client had gone", f"{report.streams_left}"),
    ):
        shown.add_row(name, value)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=512, metavar="COUNT")
    parser.add_argument("--tokens-per-s", type=float, default=50.0, metavar="RATE")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tokens-per-stream", type=int, default=1_000, metavar="COUNT")
    parser.add_argument("--out", type=Path, metavar="FILE", help="writes the figures as JSON")
    arguments = parser.parse_args(argv)
    load = Load(
        arguments.streams, arguments.tokens_per_s, arguments.seconds, arguments.tokens_per_stream
    )
    report = uvloop.run(measure(load))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(msgspec.to_builtins(report), indent=2) + "\n")
    Console().print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
