"""A bound on how long any one of many short waits may take."""

import asyncio
from collections.abc import Callable


class Patience:
    """Calls ``give_up`` when a wait has lasted ``timeout_s``.

    A stream waits for each of its tokens. ``asyncio.timeout`` makes and cancels a timer each time,
    a sixth of all that the frontend does for a token; here one timer looks at the wait that is
    going on when it fires, and is set anew for what is left of it.
    """

    def __init__(self, timeout_s: float, give_up: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._began_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A wait begins; the one before has ended."""
        self._began_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._look)

    def end(self) -> None:
        self._began_s = None

    def close(self) -> None:
        """No further wait comes."""
        self._began_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._began_s is None:
            return
        left_s = self._began_s + self._timeout_s - self._loop.time()
        if left_s <= 0:
            self._give_up()
        else:
            self._timer = self._loop.call_later(left_s, self._look)
