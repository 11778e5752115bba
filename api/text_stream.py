"""A text while it is generated, and when it is whole, as the Python clients hand it out."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from api.answers import join, usage
from api.deadline import Deadline
from api.generation import Piece, TextGeneration
from api.openai_responses import Usage
from ipc.errors import Cancelled


@dataclass(frozen=True, slots=True)
class TextPiece(Piece):
    """What one engine step adds to one choice.

    The last piece of a choice alone has a ``finish_reason``: ``stop`` or ``length``;
    ``stop_reason`` is the stop string or stop token that ended it. ``text`` is empty while a
    character or what may be a stop string is not complete. ``logprobs`` has one entry a token
    where they were asked for. ``usage`` counts all choices up to now.
    """

    usage: Usage


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """A whole answer; ``choices`` are in order of their ``index``, joined from their pieces."""

    request_id: str
    prompt_token_ids: list[int]
    choices: tuple[Piece, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text; empty where there is no tokenizer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first choice's tokens, the one that ended it included."""
        return self.choices[0].token_ids


class AsyncTextStream:
    """Yields the pieces of every choice as they come; nothing is sent before the first is asked
    for. One task at a time.

    The request is cancelled in the engine by leaving ``async with``, by ``aclose``, which any task
    may call, when the stream is dropped, when the task that waits for a piece is cancelled, and at
    the deadline, which runs from when the first piece is asked for.
    """

    def __init__(
        self,
        begin: Callable[[Deadline], Awaitable[TextGeneration]],
        request_id: str,
        timeout_s: float | None,
    ) -> None:
        self.request_id = request_id
        self._begin = begin
        self._timeout_s = timeout_s
        self._generation: TextGeneration | None = None
        self._pieces: AsyncGenerator[Piece, None] | None = None
        self._has_ended = False
        self._is_closed = False
        # Who waits for a piece.
        self._reader: asyncio.Task[Any] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextPiece:
        """The next piece.

        Raises:
            Cancelled: the stream was closed meanwhile.
            DeadlineExceeded: the answer was not complete in time.
            SidestreamError: what the engine refused the request with, or ``Unavailable`` when it
                is away or was lost.
        """
        if self._has_ended:
            raise StopAsyncIteration
        if self._reader is not None:
            raise RuntimeError("expected one reader of the stream at a time, got another")
        reader = self._reader = _current_task()
        num_cancellations = reader.cancelling()
        try:
            piece = await self._next()
        except BaseException as error:
            self._has_ended = True
            # As ``asyncio.timeout`` does: whoever else cancelled the task is not passed over.
            if self._is_closed and reader.uncancel() <= num_cancellations:
                raise _closed() from error
            raise
        finally:
            self._reader = None
        if piece is None:
            self._has_ended = True
            raise StopAsyncIteration
        return piece

    async def _next(self) -> TextPiece | None:
        if self._generation is None or self._pieces is None:
            deadline = Deadline.after(self._timeout_s)
            async with deadline.enforced():
                self._generation = await self._begin(deadline)
            self._pieces = self._generation.pieces()
        piece = await anext(self._pieces, None)
        if piece is None:
            return None
        return TextPiece(
            piece.index,
            piece.text,
            piece.token_ids,
            piece.logprobs,
            piece.finish_reason,
            piece.stop_reason,
            usage(self._generation.counts),
        )

    async def answer(self) -> TextAnswer:
        """The rest of the pieces as one answer.

        Raises:
            Cancelled: the stream was closed.
            RuntimeError: all its pieces have been read.
            SidestreamError: as ``__anext__``.
        """
        if self._is_closed:
            raise _closed()
        if self._has_ended:
            raise RuntimeError("expected a stream with pieces to come, got one that has ended")
        by_index: dict[int, list[Piece]] = {}
        async for piece in self:
            by_index.setdefault(piece.index, []).append(piece)
        if self._generation is None or not by_index:
            raise _closed()
        return TextAnswer(
            self.request_id,
            self._generation.prompts[0][0].token_ids,
            tuple(join(by_index[index]) for index in sorted(by_index)),
            usage(self._generation.counts),
        )

    async def aclose(self) -> None:
        """Wants no more: cancels what has not ended. Who waits for a piece gets ``Cancelled``."""
        if self._has_ended:
            return
        self._has_ended = self._is_closed = True
        if self._reader is not None:
            self._reader.cancel()
        elif self._pieces is not None:
            await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _closed() -> Cancelled:
    return Cancelled("the stream was closed")
