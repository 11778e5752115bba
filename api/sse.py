"""Answers a request while its client listens: at once, or as server-sent events."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.answers import AnswerWriter, join
from api.error_responses import ErrorEnvelope, defect, error_body
from api.generation import Piece
from api.patience import Patience
from api.request_ids import request_id
from ipc.errors import Cancelled, SidestreamError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What ``work`` returns; it is cancelled in the moment the client goes.

    The request's body has been read: the next thing that ``receive`` has to say is the end.

    Raises:
        Cancelled: the client has gone.
    """
    working, watching = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("the client has gone")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait((working, watching))


def all_choices(choices: list[Piece]) -> list[Piece]:
    """Where every choice is answered."""
    return choices


async def answer_whole(
    request: Request,
    pieces: AsyncGenerator[Piece, None],
    writer: AnswerWriter,
    choose: Callable[[list[Piece]], list[Piece]],
) -> Response:
    """The response once every choice has ended. Raises what ``pieces`` raises.

    ``choose`` gets them, joined, in order of their index, and gives those that are answered.
    """
    by_choice = await while_connected(request.receive, _collect(pieces))
    joined = [join(by_choice[index]) for index in sorted(by_choice)]
    return json_response(writer.whole(choose(joined)))


async def answer_streamed(
    request: Request,
    pieces: AsyncGenerator[Piece, None],
    writer: AnswerWriter,
    *,
    include_usage: bool,
    write_timeout_s: float,
) -> Response:
    """A response that begins with the first piece: an error before it still has its status."""
    events = _events(request_id(request), pieces, writer, include_usage)
    first = await while_connected(request.receive, _next(events))
    return EventStream(first, events, write_timeout_s)


def json_response(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


class EventStream(Response):
    """Sends events as they come; stops asking for them when the client is gone or stands still."""

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], write_timeout_s: float
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        # The length of what is to come is unknown.
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._rest):
            try:
                await while_connected(receive, self._send_all(send))
            except Cancelled:
                logger.debug("request %s: the client left its stream", scope["state"]["request_id"])
            except TimeoutError:
                logger.info(
                    "request %s: dropped, for the client took nothing for %g s",
                    scope["state"]["request_id"],
                    self._write_timeout_s,
                )

    async def _send_all(self, send: Send) -> None:
        """Raises ``TimeoutError`` when the client takes nothing for ``write_timeout_s``."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:
            patience = Patience(self._write_timeout_s, lambda: limit.reschedule(loop.time()))
            with contextlib.closing(patience):
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await self._send(send, start, patience)
                await self._send(send, _body(self._first), patience)
                async for event in self._rest:
                    await self._send(send, _body(event), patience)
                await self._send(send, _body(b"", more=False), patience)

    async def _send(self, send: Send, message: dict[str, Any], patience: Patience) -> None:
        patience.begin()
        await send(message)
        patience.end()


async def _events(
    request_id: str,
    pieces: AsyncGenerator[Piece, None],
    writer: AnswerWriter,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    begun = False
    async with contextlib.aclosing(pieces):
        try:
            async for piece in pieces:
                event = _event(writer.chunk(piece))
                begun = True
                yield event
        except SidestreamError as error:
            if not begun:
                raise
            yield _event(ErrorEnvelope(error_body(error)))
            return
        except Exception:
            if not begun:
                raise
            # The status has been sent: all that is left is to say it in the stream.
            logger.exception("request %s: its stream broke", request_id)
            yield _event(ErrorEnvelope(error_body(defect(request_id))))
            return
    if include_usage:
        yield _event(writer.usage_chunk())
    yield DONE


def _event(body: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _body(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _collect(pieces: AsyncGenerator[Piece, None]) -> dict[int, list[Piece]]:
    by_choice: dict[int, list[Piece]] = {}
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            by_choice.setdefault(piece.index, []).append(piece)
    return by_choice


async def _next(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
