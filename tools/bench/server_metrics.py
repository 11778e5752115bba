"""What a server's ``/metrics`` tells before, during and after a run.

The text is read with two regular expressions: a whole parser would keep the event loop from the
streams for milliseconds.
"""

import asyncio
import contextlib
import re
from time import perf_counter

from tools.bench.http_exchange import Address, ExchangeFailed, call

POLL_INTERVAL_S = 0.1
LOADS = "sidestream:adapter_loads_total"
EVICTIONS = "sidestream:adapter_evictions_total"

_PATH = "/metrics"
_COUNTER = re.compile(
    r"^(?P<name>[a-zA-Z_:][\w:]*_(?:total|sum|count))(?:\{.*\})? (?P<value>\S+)", re.MULTILINE
)
_LOADED = re.compile(r"^vllm:lora_adapter_loaded\{(?P<labels>.*)\} 1", re.MULTILINE)
_LABEL = re.compile(r'(?P<name>\w+)="(?P<value>(?:[^"\\]|\\.)*)"')


def counters(exposition: str) -> dict[str, float]:
    """Every counter's value, its labels summed up. Source: Prometheus' text format."""
    sums: dict[str, float] = {}
    for match in _COUNTER.finditer(exposition):
        sums[match["name"]] = sums.get(match["name"], 0.0) + float(match["value"])
    return sums


def adapter_levels(exposition: str) -> dict[str, str]:
    """The fastest tier of each adapter that lies in memory."""
    levels = {}
    for match in _LOADED.finditer(exposition):
        labels = {label["name"]: label["value"] for label in _LABEL.finditer(match["labels"])}
        if "adapter_name" in labels and "level" in labels:
            levels[labels["adapter_name"]] = labels["level"]
    return levels


async def scrape(address: Address) -> str | None:
    """The metrics as text; None where the server has none."""
    try:
        return (await call(address, "GET", _PATH)).decode()
    except (ExchangeFailed, UnicodeDecodeError):
        return None


class ServerWatch:
    """Follows a server's adapters while it works, if it tells of them.

    ``polls`` are ``(perf_counter, loads, evictions)``.
    """

    def __init__(self, address: Address) -> None:
        self.polls: list[tuple[float, int, int]] = []
        self._address = address
        self._levels: dict[str, str] | None = None
        self._before: dict[str, float] = {}
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Notes the counters; goes on polling a server that counts adapter loads."""
        text = await scrape(self._address)
        if text is None:
            return
        self._before = counters(text)
        if LOADS in self._before:
            self._take(text)
            self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> dict[str, float]:
        """Ends polling. What has been counted since ``start``, where it is not nothing."""
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._polling
        text = await scrape(self._address)
        if text is None or not self._before:
            return {}
        differences = {
            name: value - self._before.get(name, 0.0) for name, value in counters(text).items()
        }
        return {name: value for name, value in differences.items() if value}

    def level(self, adapter: str | None) -> str | None:
        """Where an adapter lay at the last poll; None when the server does not tell."""
        if adapter is None or self._levels is None:
            return None
        return self._levels.get(adapter, "disk")

    def _take(self, text: str) -> None:
        now_s = perf_counter()
        counted = counters(text)
        self.polls.append((now_s, int(counted[LOADS]), int(counted.get(EVICTIONS, 0))))
        self._levels = adapter_levels(text)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_INTERVAL_S)
            text = await scrape(self._address)
            # While an engine restarts, its counters are missing.
            if text is not None and f"\n{LOADS}" in text:
                self._take(text)
