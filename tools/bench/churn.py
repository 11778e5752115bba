"""Adapters that come and go while a workload runs."""

import asyncio
import contextlib
from collections.abc import Sequence
from time import perf_counter

from tools.bench.http_exchange import Address, ExchangeFailed, call
from tools.bench.records import ChurnOperation

_OPERATION_TIMEOUT_S = 120.0


class Churn:
    """Every ``interval_s`` registers one more adapter, and forgets the one before it.

    ``paths`` are folders on the server's machine, taken in turn. Nobody asks for these adapters:
    their coming and going alone is the disturbance. An operation that takes longer than the
    interval delays the next.
    """

    def __init__(self, address: Address, paths: Sequence[str], interval_s: float) -> None:
        self._address = address
        self._paths = paths
        self._interval_s = interval_s
        self._registered: str | None = None
        self._stopping = asyncio.Event()
        # Times are perf_counter's.
        self.operations: list[ChurnOperation] = []

    async def run(self) -> None:
        """Until ``stop`` was called. The server has the adapters then that it had before."""
        number, begin_s = 0, perf_counter()
        while True:
            number += 1
            wait_s = max(0.0, begin_s + number * self._interval_s - perf_counter())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            if self._stopping.is_set():
                break
            name, path = f"bench-churn-{number}", self._paths[number % len(self._paths)]
            was_loaded = await self._operate("load", name, {"lora_name": name, "lora_path": path})
            if was_loaded:
                await self._unload()
                self._registered = name
        await self._unload()

    def stop(self) -> None:
        """Begins nothing more; what is under way is finished."""
        self._stopping.set()

    async def _unload(self) -> None:
        if self._registered is not None:
            name, self._registered = self._registered, None
            await self._operate("unload", name, {"lora_name": name})

    async def _operate(self, action: str, name: str, body: dict[str, str]) -> bool:
        begin_s, failure = perf_counter(), None
        path = f"/v1/{action}_lora_adapter"
        try:
            await call(self._address, "POST", path, body, _OPERATION_TIMEOUT_S)
        except ExchangeFailed as error:
            failure = str(error)
        seconds = round(perf_counter() - begin_s, 6)
        self.operations.append(ChurnOperation(begin_s, action, name, seconds, failure))
        return failure is None
