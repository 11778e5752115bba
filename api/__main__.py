"""The frontend's process: ``python -m api``, started by the supervisor."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import uvicorn
import uvloop
import zmq.asyncio
from starlette.types import ASGIApp

from api.app import build_app
from api.config import ApiConfig
from api.engine_client import EngineClient, Timeouts
from api.template_files import TemplateFiles, read_template_files
from api.template_process import ChatRenderer, TemplateLimits, TemplateProcess
from api.tokenizer import TextTokenizer
from ipc.errors import InvalidRequest, SidestreamError, Unavailable
from ipc.process import Child, adopt

logger = logging.getLogger(__name__)

# After the drain every answer has ended; this is for writing the last of them out.
CLOSE_S = 2


class HttpServer(uvicorn.Server):
    """Serves ``app`` until SIGTERM; then answers what is open, for ``drain_s`` at most.

    Requests that still run after that are ended with ``Unavailable``, so that every client is
    told. ``started`` is called once, when connections are accepted.
    """

    def __init__(
        self, app: ASGIApp, engine: EngineClient, drain_s: float, on_started: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(drain_s) + CLOSE_S,
            )
        )
        self._engine = engine
        self._drain_s = drain_s
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        error = Unavailable("the server is stopping", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain_s, self._engine.end_all, error)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own would send itself the signal again, and so never end with status 0.

        Only the main thread can have a handler; whoever serves on another sets ``should_exit``.
        """
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, self.handle_exit, signal.SIGTERM, None)
        yield


async def serve(
    child: Child[ApiConfig], tokenizer: TextTokenizer | None, templates: TemplateFiles | None
) -> None:
    """Serves until SIGTERM.

    Raises:
        SidestreamError: as ``chat_renderer``.
        ExceptionGroup: of ``Unavailable`` when no engine came in time, of ``OSError`` when the
            address can not be listened at.
    """
    config = child.config
    timeouts = Timeouts(
        handshake_s=config.handshake_timeout_s,
        call_s=config.call_timeout_s,
        load_adapter_s=config.load_adapter_timeout_s,
        token_s=config.token_timeout_s,
    )
    with zmq.asyncio.Context() as context:
        endpoint = child.run_folder.rpc_endpoint
        engine = EngineClient(context, endpoint, timeouts, config.stream_window)
        async with chat_renderer(child, templates) as renderer, asyncio.TaskGroup() as group:
            connecting = group.create_task(engine.run())
            await engine.wait_connected(config.connect_timeout_s)
            with listen(config.host, config.port) as listener:
                host, port = listener.getsockname()[:2]
                server = HttpServer(
                    build_app(config, engine, tokenizer, renderer),
                    engine,
                    config.drain_s,
                    lambda: child.ready(f"{host}:{port}"),
                )
                await server.serve([listener])
            connecting.cancel()


@contextlib.asynccontextmanager
async def chat_renderer(
    child: Child[ApiConfig], templates: TemplateFiles | None
) -> AsyncIterator[ChatRenderer | None]:
    """What renders chats with ``templates``; None without any.

    Raises:
        InvalidRequest: one of them is not a template. The supervisor has been told.
        Unavailable: the process that is to render died.
    """
    if templates is None:
        yield None
        return
    config = child.config
    limits = TemplateLimits(
        timeout_s=config.template_timeout_s,
        max_memory_bytes=config.max_template_memory_bytes,
        max_prompt_chars=config.max_prompt_chars,
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            renderer = await stack.enter_async_context(TemplateProcess(templates, limits))
        except InvalidRequest as error:
            child.failed(error)
            raise
        yield renderer


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; raises ``OSError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def main() -> int:
    child = adopt(ApiConfig)
    folder, override = Path(child.config.model), child.config.chat_template
    try:
        tokenizer = TextTokenizer.from_folder(folder)
        templates = read_template_files(folder, Path(override) if override else None)
    except SidestreamError as error:
        child.failed(error)
        return 1
    logger.info(
        "%s tokenizer, %s chat template in %s",
        "a" if tokenizer else "no",
        "a" if templates else "no",
        folder,
    )
    status = 0
    try:
        uvloop.run(serve(child, tokenizer, templates))
    except* SidestreamError as group:
        logger.error("can not serve: %s", group.exceptions[0])
        status = 1
    except* OSError as group:
        where = f"{child.config.host}:{child.config.port}"
        child.failed(Unavailable(f"can not listen at {where}: {group.exceptions[0]}"))
        status = 1
    finally:
        child.run_folder.leave()
    return status


if __name__ == "__main__":
    sys.exit(main())
