"""The asynchronous Python client: text and token ids, straight from the engine.

It speaks to the engine as the HTTP frontend does, and makes text on this side with the frontend's
own code: tokenizer, chat template, detokenizer, stop strings.
"""

import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from api.client_arguments import (
    adapter_names,
    adapter_path,
    call_options,
    decodable_tokens,
    request_name,
    sendable_text,
)
from api.client_config import ClientConfig, find_endpoint, read_keys
from api.client_options import (
    ChatOptions,
    CompletionOptions,
    answer_length,
    chat_call,
    completion_call,
    num_logprobs,
)
from api.client_session import ClientSession, open_session
from api.deadline import Deadline
from api.engine_client import CallOptions
from api.generation import TextGeneration
from api.generation_calls import GenerationCall, text_generation
from api.metrics import RequestMetrics
from api.prompts import PromptEncoder
from api.text_stream import AsyncTextStream, TextAnswer
from ipc.errors import Cancelled, InvalidRequest
from ipc.messages import AdapterList, AdapterStatus, EngineStats, Health, Welcome


class AsyncSidestreamClient:
    """A line to one engine, for one event loop; any number of calls may run at a time.

    | state     | entered by                    | a call                                         |
    |-----------|-------------------------------|------------------------------------------------|
    | new       | the constructor               | ``RuntimeError``                               |
    | connected | ``connect``, ``async with``   | is sent; ``Unavailable`` while the engine is   |
    |           |                               | away: it is connected to again when it is back |
    | closed    | ``close``, leaving the block  | ``RuntimeError``; open ones end ``Cancelled``  |

    ``server`` is an ``ipc://`` or ``tcp://`` endpoint, a server's run folder, or None for the one
    server of this user's that runs here. ``model`` is the folder of the model that it serves, for
    its tokenizer and chat template; without it, prompts and answers are token ids alone. TCP needs
    ``key``, the file of this client's own pair (``.key_secret``), and ``server_key``, that of the
    server's public one (``.key``).

    Every call takes ``timeout_s``, within which it is to be complete, on this side and in the
    engine, and ``metadata``, which the engine logs with whatever goes wrong.
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
        self._server = server
        self._key_files = key, server_key
        self._model = None if model is None else Path(model)
        self._config = config or ClientConfig()
        self._session: ClientSession | None = None
        self._exits = contextlib.AsyncExitStack()
        self._is_closed = False

    # --- Its life ---------------------------------------------------------------------------

    async def connect(self) -> None:
        """Reads the model's folder and waits for the engine; ``async with`` does this.

        Raises:
            InvalidRequest: ``server`` or ``model`` is not what it should be.
            Unavailable: no server runs, or none answers within ``connect_timeout_s``.
            Unauthenticated: the server does not take the key, or has another one.
            RuntimeError: it was connected before.
        """
        if self._session is not None or self._is_closed:
            raise RuntimeError("expected a new client: this one has been connected")
        config, endpoint = self._config, find_endpoint(self._server)
        keys = read_keys(endpoint, *self._key_files)
        async with contextlib.AsyncExitStack() as exits:
            self._session = await exits.enter_async_context(
                open_session(endpoint, keys, self._model, config)
            )
            self._exits = exits.pop_all()

    async def close(self) -> None:
        """Ends what still runs with ``Cancelled``, here and in the engine. Once is enough."""
        session, self._session = self._session, None
        self._is_closed = True
        if session is not None:
            session.engine.end_all(Cancelled("the client was closed"))
        await self._exits.aclose()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def _connected(self) -> ClientSession:
        if self._session is None:
            state = "closed" if self._is_closed else "not connected yet"
            raise RuntimeError(f"expected a connected client, got one that is {state}")
        return self._session

    # --- Text -------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[CompletionOptions],
    ) -> TextAnswer:
        """The whole continuation of ``prompt``, a text or a list of token ids.

        ``adapter`` None is the base model. ``request_id`` is what logs call it, on both sides;
        None makes one. The answer is complete within ``timeout_s`` seconds, or cancelled; None
        waits as long as tokens come. ``options``: see ``CompletionOptions``.

        Raises:
            TypeError: an option that there is not.
            InvalidRequest: a field is wrong, or a text can not be encoded: no tokenizer.
            AdapterNotFound: no adapter has this name.
            AdapterInvalid: its files can not be served exactly.
            Overloaded: a queue is full; the same request may succeed later.
            DeadlineExceeded: ``timeout_s`` has passed, or no token came for ``token_timeout_s``.
            Unavailable: the engine is away, or was lost meanwhile.
            RuntimeError: the client is not connected.
        """
        stream = self.stream(
            prompt,
            adapter=adapter,
            request_id=request_id,
            timeout_s=timeout_s,
            metadata=metadata,
            **options,
        )
        return await stream.answer()

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[CompletionOptions],
    ) -> AsyncTextStream:
        """As ``generate``, piece by piece as the engine's steps bring them.

        What is wrong with the call itself is raised here, all else by the stream.
        """
        if isinstance(prompt, str):
            sendable_text("prompt", prompt)
        call = completion_call(prompt, options, self._config)
        (given,) = call.prompts()

        async def encode(prompts: PromptEncoder) -> list[int]:
            with_special_tokens = call.add_special_tokens is not False
            return await prompts.encode(given, add_special_tokens=with_special_tokens)

        return self._stream(call, encode, adapter, request_id, timeout_s, metadata)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ChatOptions],
    ) -> TextAnswer:
        """The assistant's next message, whole; ``messages`` are OpenAI's.

        ``options``: see ``ChatOptions``; the other arguments are those of ``generate``.

        Raises:
            InvalidRequest: the chat template refuses the messages, or there is none.
            Exception: else as ``generate``.
        """
        stream = self.stream_chat(
            messages,
            adapter=adapter,
            request_id=request_id,
            timeout_s=timeout_s,
            metadata=metadata,
            **options,
        )
        return await stream.answer()

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncTextStream:
        """As ``chat``, piece by piece. What is wrong with the call itself is raised here."""
        call = chat_call(messages, options, self._config)

        async def encode(prompts: PromptEncoder) -> list[int]:
            try:
                return await prompts.encode_chat(call)
            except UnicodeEncodeError:
                raise InvalidRequest(
                    "messages: expected whole characters, got half of a surrogate pair",
                    param="messages",
                ) from None

        return self._stream(call, encode, adapter, request_id, timeout_s, metadata)

    def _stream(
        self,
        call: GenerationCall,
        encode: Callable[[PromptEncoder], Awaitable[list[int]]],
        adapter: str | None,
        request_id: str | None,
        timeout_s: float | None,
        metadata: Mapping[str, str] | None,
    ) -> AsyncTextStream:
        session = self._connected
        name = request_name(request_id)
        if adapter is not None:
            sendable_text("adapter", adapter)
        options = call_options(timeout_s, metadata)

        async def begin(deadline: Deadline) -> TextGeneration:
            return text_generation(
                session.engine,
                session.tokenizer,
                session.metrics,
                call,
                name=name,
                prompts=[await encode(session.prompts)],
                adapters=[adapter],
                max_tokens=answer_length(call),
                logprobs=num_logprobs(call),
                call_options=CallOptions(deadline.left_s, options.metadata),
            )

        return AsyncTextStream(begin, name, options.timeout_s)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids that ``generate`` makes of ``text``.

        Raises:
            InvalidRequest: the model's folder has no tokenizer, or none was given.
            RuntimeError: the client is not connected.
        """
        return await self._connected.prompts.encode(
            sendable_text("text", text), add_special_tokens=add_special_tokens
        )

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``token_ids``, as a text of its own.

        Raises:
            InvalidRequest: they can be no tokens; else as ``tokenize``.
        """
        tokenizer = self._connected.tokenizer
        if tokenizer is None:
            raise InvalidRequest("the model's folder has no tokenizer.json, or none was given")
        return tokenizer.decode(
            decodable_tokens(token_ids), skip_special_tokens=skip_special_tokens
        )

    # --- Adapters ---------------------------------------------------------------------------

    async def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        pinned: bool = False,
        replace: bool = False,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AdapterStatus:
        """Registers the adapter at ``path``, a folder or file as the server sees it.

        ``pinned`` keeps it from being evicted; ``replace`` puts it in the place of another one of
        the name.

        Raises:
            AdapterConflict: the name is taken, and ``replace`` is False.
            AdapterInvalid: its files can not be served exactly.
            InvalidRequest: the path is not one that the server may read.
            DeadlineExceeded: it was not inspected within ``timeout_s`` seconds; None: within
                ``load_adapter_timeout_s``. It may be registered all the same.
            Unavailable: the engine or its loader is away.
            RuntimeError: the client is not connected.
        """
        return await self._connected.engine.load_adapter(
            sendable_text("name", name),
            adapter_path(path),
            pinned=bool(pinned),
            replace=bool(replace),
            options=call_options(timeout_s, metadata),
        )

    async def unload_adapter(
        self,
        name: str,
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Makes the server forget an adapter; accepted requests are still served.

        Raises:
            AdapterNotFound: no adapter has this name.
            Exception: else as ``stats``.
        """
        await self._connected.engine.unload_adapter(
            sendable_text("name", name), call_options(timeout_s, metadata)
        )

    async def list_adapters(
        self,
        *,
        with_folder: bool = True,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> AdapterList:
        """The registered adapters, and, ``with_folder``, the names in the server's adapter folder
        that have not been used. Raises as ``stats``."""
        return await self._connected.engine.list_adapters(
            with_folder=bool(with_folder), options=call_options(timeout_s, metadata)
        )

    async def prefetch(
        self,
        names: Sequence[str],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[AdapterStatus]:
        """Hints at adapters that are likely to be asked for; how they are now, in that order.

        Raises:
            AdapterNotFound: some names mean nothing; none of the others is hinted at either.
            InvalidRequest: they are too many.
            Exception: else as ``stats``, and what keeps one of them from being served.
        """
        return await self._connected.engine.prefetch_adapters(
            adapter_names(names), call_options(timeout_s, metadata)
        )

    # --- The engine -------------------------------------------------------------------------

    async def stats(
        self, *, timeout_s: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> EngineStats:
        """The engine's counters and gauges, from between two of its steps.

        Raises:
            DeadlineExceeded: no answer within ``timeout_s`` seconds, or ``call_timeout_s``.
            Unavailable: the engine is away, or was lost meanwhile.
            RuntimeError: the client is not connected.
        """
        return await self._connected.engine.stats(call_options(timeout_s, metadata))

    async def health(
        self, *, timeout_s: float | None = None, metadata: Mapping[str, str] | None = None
    ) -> Health:
        """Whether the engine's steps go on, and adapters can be loaded. Raises as ``stats``."""
        return await self._connected.engine.health(call_options(timeout_s, metadata))

    @property
    def engine(self) -> Welcome:
        """Who the engine is: its life's number, the model's lengths and vocabulary.

        Raises:
            Unavailable: it is away.
            RuntimeError: the client is not connected.
        """
        return self._connected.engine.welcome

    @property
    def metrics(self) -> RequestMetrics:
        """What this client saw of its requests; ``metrics.registry`` is Prometheus's."""
        return self._connected.metrics
