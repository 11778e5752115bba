"""The tokens of one HTTP request, which may be several requests of the engine's."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from api.patience import Patience
from ipc.deltas import join_deltas
from ipc.errors import DeadlineExceeded, SidestreamError, error_from_info
from ipc.messages import RequestId, TokenDelta


class TokenStream:
    """Yields ``(index, delta)`` in order of arrival until every request of ``ids`` has ended.

    What several steps brought one request while the reader was busy comes as one delta: a reader
    that falls behind has less to do for a token, and catches up.

    ``index`` is a request's place in ``ids``. One failed request fails the whole stream. Leaving
    the ``async with`` block cancels in the engine whatever has not ended by then.

    ``forget(id, cancel)`` is called once for every request, when it has ended for this side;
    ``cancel`` says that the engine has yet to be told. Each request began with ``window`` credits,
    and ``grant(id, num)`` gives it those back whose deltas have been read: a reader that falls
    behind lets the engine hold back and join what is to come.
    """

    def __init__(
        self,
        ids: Sequence[RequestId],
        forget: Callable[[RequestId, bool], None],
        grant: Callable[[RequestId, int], None],
        window: int,
        token_timeout_s: float,
        timeout_s: float | None = None,
    ) -> None:
        self._index = {request_id: index for index, request_id in enumerate(ids)}
        self._ids = tuple(ids)
        self._forget = forget
        self._grant = grant
        self._grant_at = max(1, window // 2)
        self._num_read = [0] * len(self._ids)
        self._token_timeout_s = token_timeout_s
        self._patience = Patience(token_timeout_s, self._give_up)
        self._open = set(ids)
        self._stopped: set[int] = set()
        self._pending: dict[int, list[TokenDelta]] = {}
        self._error: SidestreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            self._expiry = loop.call_later(timeout_s, self._expire, timeout_s)

    # --- The engine client's side -----------------------------------------------------------

    def push(self, delta: TokenDelta) -> None:
        """Takes what one step has for one of the requests. Never blocks."""
        request_id = delta.request_id
        if request_id not in self._open:
            return
        if delta.error is not None:
            self._end(request_id, cancel=False)
            self.fail(error_from_info(delta.error))
            return
        if delta.finish_reason is not None:
            self._end(request_id, cancel=False)
        self._pending.setdefault(self._index[request_id], []).append(delta)
        self._wake()

    def fail(self, error: SidestreamError, *, cancel: bool = True) -> None:
        """Ends the stream: the reader gets ``error`` at once, pending deltas are dropped.

        ``cancel`` False spares the engine the cancellations: it is not there to hear them.
        """
        if self._error is None:
            self._error = error
        self._pending.clear()
        for request_id in tuple(self._open):
            self._end(request_id, cancel=cancel)
        self._wake()

    # --- The reader's side ------------------------------------------------------------------

    def stop(self, index: int) -> None:
        """Wants no more of one request: cancels it, and drops what is still on its way."""
        self._stopped.add(index)
        if self._ids[index] in self._open:
            self._end(self._ids[index], cancel=True)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, TokenDelta]:
        """The next delta.

        Raises:
            DeadlineExceeded: ``token_timeout_s`` went by without one.
            SidestreamError: what the engine answered to one of the requests, or ``Unavailable``
                when the engine is gone.
        """
        while True:
            while self._pending:
                index, delta = self._take()
                if index not in self._stopped:
                    return index, delta
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            await self._wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._patience.close()
        for request_id in tuple(self._open):
            self._end(request_id, cancel=True)

    def _take(self) -> tuple[int, TokenDelta]:
        """All that is there of the request that has waited longest."""
        index = next(iter(self._pending))
        deltas = self._pending.pop(index)
        self._num_read[index] += len(deltas)
        if self._num_read[index] >= self._grant_at and self._ids[index] in self._open:
            self._grant(self._ids[index], self._num_read[index])
            self._num_read[index] = 0
        return index, join_deltas(deltas)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        self._patience.begin()
        try:
            await self._waiter
        finally:
            self._patience.end()
            self._waiter = None

    def _expire(self, timeout_s: float) -> None:
        self.fail(DeadlineExceeded(f"the answer was not complete within {timeout_s:g} s"))

    def _give_up(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(
                DeadlineExceeded(f"the engine sent no token within {self._token_timeout_s:g} s")
            )

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end(self, request_id: RequestId, *, cancel: bool) -> None:
        self._open.discard(request_id)
        if not self._open and self._expiry is not None:
            self._expiry.cancel()
        self._forget(request_id, cancel)
