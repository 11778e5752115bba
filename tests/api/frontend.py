"""The whole frontend before a scripted engine, without a process of its own."""

import asyncio
import contextlib
import functools
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import httpx
import msgspec
import uvloop
import zmq.asyncio
from starlette.types import ASGIApp

from api.__main__ import HttpServer, listen
from api.app import build_app
from api.chat_template import ChatTemplate
from api.config import ApiConfig
from api.engine_client import EngineClient, Timeouts
from api.template_files import TemplateFiles
from api.tokenizer import TextTokenizer
from ipc.messages import RenderChat, RequestId
from tests.api.fake_engine import FakeEngine, Script, says
from tools.tiny_model.tokenizer import BOS, CHAT_TEMPLATE, EOS, save_tokenizer

DEADLINE_S = 10.0

Parameters = ParamSpec("Parameters")


def on_loop(
    test: Callable[Parameters, Coroutine[Any, Any, None]],
) -> Callable[Parameters, None]:
    """Runs a test that is a coroutine, on uvloop, within a deadline."""

    @functools.wraps(test)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        uvloop.run(asyncio.wait_for(test(*args, **kwargs), 3 * DEADLINE_S))

    return run


async def until(condition: Callable[[], bool]) -> None:
    """Waits for ``condition``, which something else on this loop brings about."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        await asyncio.sleep(0.001)


class InlineRenderer:
    """Implements ``ChatRenderer`` in this process."""

    def __init__(self, source: str) -> None:
        special_tokens = {"bos_token": BOS, "eos_token": EOS}
        self._template = ChatTemplate(TemplateFiles({"default": source}, special_tokens))

    async def render(self, chat: RenderChat) -> str:
        return self._template.render(chat)


@dataclass
class Frontend:
    """``http`` calls the application without a socket; ``served`` has it on one."""

    app: ASGIApp
    engine: FakeEngine
    client: EngineClient
    http: httpx.AsyncClient
    config: ApiConfig

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def complete(self, prompt: Any = "x", **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", **{"model": "base", "prompt": prompt, **fields})

    async def chat(self, content: Any = "x", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        body = {"model": "base", "messages": messages, **fields}
        return await self.post("/v1/chat/completions", **body)


@contextlib.asynccontextmanager
async def frontend(
    script: Script | None = None,
    *,
    tokenizer: bool = True,
    template: str | None = CHAT_TEMPLATE,
    step_by_step: bool = False,
    **config_fields: Any,
) -> AsyncIterator[Frontend]:
    """A frontend whose engine answers by ``script``; its model has one token a byte.

    ``step_by_step`` each of the engine's steps is read before the next one comes.
    """
    with tempfile.TemporaryDirectory() as folder, zmq.asyncio.Context() as context:
        if tokenizer:
            save_tokenizer(Path(folder))
        config = ApiConfig(model=folder, served_model_name="base", **config_fields)
        endpoint = f"ipc://{folder}/s"
        engine = FakeEngine(endpoint, script or says("ok"))
        engine.start()
        timeouts = Timeouts(handshake_s=2.0, call_s=2.0, load_adapter_s=2.0, token_s=DEADLINE_S)
        client = EngineClient(context, endpoint, timeouts, config.stream_window)
        if step_by_step:
            engine.before_send = _Steps(client).wait
        running = asyncio.create_task(client.run())
        try:
            await client.wait_connected(DEADLINE_S)
            text = TextTokenizer.from_folder(Path(folder))
            app = build_app(config, client, text, InlineRenderer(template) if template else None)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://base") as http:
                yield Frontend(app, engine, client, http, config)
        finally:
            running.cancel()
            await asyncio.wait((running,))
            await engine.close()


class _Steps:
    """Lets the engine send a step when the one before it has been read."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._last: asyncio.Future[None] | None = None

    async def wait(self, request_id: RequestId) -> None:
        """Until whoever reads the request's stream waits, and not as for the last step."""
        while stream := self._client._streams.get(request_id):
            waiter = stream._waiter
            if waiter not in (None, self._last) and not waiter.done():
                self._last = waiter
                return
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def served(
    front: Frontend, drain_s: float = 5.0, send_buffer_bytes: int | None = None
) -> AsyncIterator[str]:
    """The application behind a real server on the loopback interface; yields its URL."""
    started = asyncio.Event()
    with listen("127.0.0.1", 0) as listener:
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        server = HttpServer(front.app, front.client, drain_s, started.set)
        serving = asyncio.create_task(server.serve([listener]))
        serving.add_done_callback(lambda _: started.set())
        await started.wait()
        if serving.done():
            serving.result()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events; ``[DONE]`` must be the last line, and is left out."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return [msgspec.json.decode(line) for line in lines[:-1]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape and this status."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    details: dict[str, Any] = body["error"]
    return details
