"""The Python client for programs without an event loop: the asynchronous one, on a thread."""

import contextlib
import os
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from api.async_client import AsyncSidestreamClient
from api.client_config import ClientConfig
from api.client_options import ChatOptions, CompletionOptions
from api.loop_thread import LoopThread
from api.text_stream import AsyncTextStream, TextAnswer, TextPiece
from ipc.messages import AdapterList, AdapterStatus, EngineStats, Health, Welcome


class TextStream:
    """Yields the pieces of every choice as they come; nothing is sent before the first is asked
    for. Read by one thread at a time.

    The request is cancelled in the engine by leaving ``with``, by ``close``, which any thread may
    call, when the stream is dropped, by what interrupts the wait for a piece, as Ctrl-C does, and
    at its deadline.
    """

    def __init__(
        self,
        client: "SidestreamClient",
        loop: LoopThread[AsyncSidestreamClient],
        stream: AsyncTextStream,
    ) -> None:
        self.request_id = stream.request_id
        # Which ends the loop when it is dropped.
        self._client = client
        self._loop = loop
        self._stream = stream

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextPiece:
        """The next piece. Raises as ``AsyncTextStream.__anext__``."""

        async def advance(_: AsyncSidestreamClient) -> TextPiece | None:
            return await anext(self._stream, None)

        piece = self._loop.run(advance)
        if piece is None:
            raise StopIteration
        return piece

    def answer(self) -> TextAnswer:
        """The rest of the pieces as one answer. Raises as ``AsyncTextStream.answer``."""
        return self._loop.run(lambda _: self._stream.answer())

    def close(self) -> None:
        """Wants no more: cancels what has not ended. Who waits for a piece gets ``Cancelled``."""
        self._loop.post(lambda _: self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class SidestreamClient:
    """``AsyncSidestreamClient``, method by method, for any number of threads.

    Its arguments, options and errors are those; ``RuntimeError`` is for a client that is closed,
    or that is used in a process forked off from the one that made it. One that is dropped closes
    itself, and so does one that is open when the program ends.
    """

    def __init__(
        self,
        server: str | os.PathLike[str] | None = None,
        *,
        model: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        server_key: str | os.PathLike[str] | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        """Connects. Raises as ``AsyncSidestreamClient.connect``."""
        self._loop = LoopThread(
            AsyncSidestreamClient(
                server, model=model, key=key, server_key=server_key, config=config
            ),
            "sidestream-client",
        )
        weakref.finalize(self, self._loop.close).atexit = False
        # For the program's end, at which not every Python can end a loop any more.
        weakref.finalize(self, _close_client, self._loop)

    def close(self) -> None:
        """Ends what still runs with ``Cancelled``, here and in the engine. Once is enough."""
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- Text -------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[CompletionOptions],
    ) -> TextAnswer:
        """The whole continuation of ``prompt``. As ``AsyncSidestreamClient.generate``."""
        return self._loop.run(
            lambda client: client.generate(
                prompt,
                adapter=adapter,
                request_id=request_id,
                timeout_s=timeout_s,
                metadata=metadata,
                **options,
            )
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[CompletionOptions],
    ) -> TextStream:
        """As ``generate``, piece by piece. As ``AsyncSidestreamClient.stream``."""

        async def begin(client: AsyncSidestreamClient) -> AsyncTextStream:
            return client.stream(
                prompt,
                adapter=adapter,
                request_id=request_id,
                timeout_s=timeout_s,
                metadata=metadata,
                **options,
            )

        return TextStream(self, self._loop, self._loop.run(begin))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ChatOptions],
    ) -> TextAnswer:
        """The assistant's next message, whole. As ``AsyncSidestreamClient.chat``."""
        return self._loop.run(
            lambda client: client.chat(
                messages,
                adapter=adapter,
                request_id=request_id,
                timeout_s=timeout_s,
                metadata=metadata,
                **options,
            )
        )

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ChatOptions],
    ) -> TextStream:
        """As ``chat``, piece by piece. As ``AsyncSidestreamClient.stream_chat``."""

        async def begin(client: AsyncSidestreamClient) -> AsyncTextStream:
            return client.stream_chat(
                messages,
                adapter=adapter,
                request_id=request_id,
                timeout_s=timeout_s,
                metadata=metadata,
                **options,
            )

        return TextStream(self, self._loop, self._loop.run(begin))

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids that ``generate`` makes of ``text``.

        Raises:
            InvalidRequest: the model's folder has no tokenizer, or none was given.
        """
        return self._loop.run(
            lambda client: client.tokenize(text, add_special_tokens=add_special_tokens)
        )

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``token_ids``, as a text of its own. Raises as ``tokenize``."""

        async def decode(client: AsyncSidestreamClient) -> str:
            return client.detokenize(token_ids, skip_special_tokens=skip_special_tokens)

        return self._loop.run(decode)

    # --- Adapters ---------------------------------------------------------------------------

    def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        pinned: bool = False,
        replace: bool = False,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AdapterStatus:
        """Registers an adapter. As ``AsyncSidestreamClient.load_adapter``."""
        return self._loop.run(
            lambda client: client.load_adapter(
                name, path, pinned=pinned, replace=replace, timeout_s=timeout_s, metadata=metadata
            )
        )

    def unload_adapter(
        self,
        name: str,
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Forgets an adapter. As ``AsyncSidestreamClient.unload_adapter``."""
        self._loop.run(
            lambda client: client.unload_adapter(name, timeout_s=timeout_s, metadata=metadata)
        )

    def list_adapters(
        self,
        *,
        with_folder: bool = True,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AdapterList:
        """Which adapters there are. As ``AsyncSidestreamClient.list_adapters``."""
        return self._loop.run(
            lambda client: client.list_adapters(
                with_folder=with_folder, timeout_s=timeout_s, metadata=metadata
            )
        )

    def prefetch(
        self,
        names: Sequence[str],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[AdapterStatus]:
        """Hints at adapters that are likely to come. As ``AsyncSidestreamClient.prefetch``."""
        return self._loop.run(
            lambda client: client.prefetch(names, timeout_s=timeout_s, metadata=metadata)
        )

    # --- The engine -------------------------------------------------------------------------

    def stats(
        self, *, timeout_s: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> EngineStats:
        """The engine's counters and gauges. As ``AsyncSidestreamClient.stats``."""
        return self._loop.run(lambda client: client.stats(timeout_s=timeout_s, metadata=metadata))

    def health(
        self, *, timeout_s: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> Health:
        """Whether the engine's steps go on. As ``AsyncSidestreamClient.health``."""
        return self._loop.run(lambda client: client.health(timeout_s=timeout_s, metadata=metadata))

    @property
    def engine(self) -> Welcome:
        """Who the engine is. As ``AsyncSidestreamClient.engine``."""

        async def ask(client: AsyncSidestreamClient) -> Welcome:
            return client.engine

        return self._loop.run(ask)


def _close_client(loop: LoopThread[AsyncSidestreamClient]) -> None:
    """Closes the client of ``loop``, if that is open."""
    with contextlib.suppress(RuntimeError):
        loop.run(lambda client: client.close())
