"""When a call is to have ended."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Self

from ipc.errors import DeadlineExceeded


@dataclass(frozen=True)
class Deadline:
    """A moment on the running event loop's clock; never, where ``timeout_s`` is None."""

    timeout_s: float | None
    at_s: float | None

    @classmethod
    def after(cls, timeout_s: float | None) -> Self:
        """``timeout_s`` from now."""
        now_s = asyncio.get_running_loop().time()
        return cls(timeout_s, None if timeout_s is None else now_s + timeout_s)

    @property
    def left_s(self) -> float | None:
        """Seconds until then, 0 if it has passed; None for never."""
        if self.at_s is None:
            return None
        return max(0.0, self.at_s - asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def enforced(self) -> AsyncIterator[None]:
        """Leaves the block at the deadline; raises ``DeadlineExceeded`` then."""
        try:
            async with asyncio.timeout_at(self.at_s):
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {self.timeout_s:g} s") from None
