"""How late the load generator itself is."""

import asyncio
from time import perf_counter

INTERVAL_S = 0.005


class LoopLag:
    """Asks the event loop for a call every 5 ms, and notes by how much each comes late.

    A token that arrives meanwhile is stamped late by no more than that. The loop's own timers
    count milliseconds: lags below one mean nothing.
    """

    def __init__(self) -> None:
        self.lags_us: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._due_s = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due_s = perf_counter() + INTERVAL_S
        self._handle = self._loop.call_later(INTERVAL_S, self._tick)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _tick(self) -> None:
        self.lags_us.append(max(0, round((perf_counter() - self._due_s) * 1e6)))
        self.start()
