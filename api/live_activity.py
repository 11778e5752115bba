"""What the engine is at, for any number of pages that look at the same time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ipc.errors import SidestreamError
from ipc.messages import Activity

SHARED_S = 0.5


@dataclass(frozen=True)
class Seen:
    """The engine's ``activity``, or None and the ``reason`` why it did not tell."""

    activity: Activity | None
    reason: str | None


class LiveActivity:
    """Asks the engine at most once in ``SHARED_S``, and shares what it said.

    To tell takes the engine's step thread up to a millisecond, which is not to grow with the
    number of those who look.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[Activity]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._asking = asyncio.Lock()
        self._seen: Seen | None = None
        self._seen_s = 0.0

    async def look(self) -> Seen:
        """What was seen less than ``SHARED_S`` ago, by whomever."""
        async with self._asking:
            if self._seen is None or self._clock() - self._seen_s >= SHARED_S:
                self._seen = await self._answer()
                self._seen_s = self._clock()
            return self._seen

    async def _answer(self) -> Seen:
        try:
            return Seen(await self._ask(), None)
        except SidestreamError as error:
            return Seen(None, error.message)
