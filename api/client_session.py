"""What a connected Python client has: its line to the engine, and the model's text side."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import zmq.asyncio

from api.client_config import ClientConfig
from api.engine_client import EngineClient
from api.metrics import RequestMetrics
from api.prompts import PromptEncoder
from api.template_files import TemplateFiles, read_template_files
from api.template_process import TemplateProcess
from api.tokenizer import TextTokenizer
from ipc.curve import ClientKeys
from ipc.errors import InvalidRequest


@dataclass(frozen=True)
class ClientSession:
    """``tokenizer`` is None where the model's folder has none, or was not given."""

    engine: EngineClient
    tokenizer: TextTokenizer | None
    prompts: PromptEncoder
    metrics: RequestMetrics


@contextlib.asynccontextmanager
async def open_session(
    endpoint: str, keys: ClientKeys | None, model: Path | None, config: ClientConfig
) -> AsyncIterator[ClientSession]:
    """Reads the model's folder and waits for the engine.

    Raises:
        InvalidRequest: ``model`` is no folder, or its tokenizer can not be read.
        Unavailable: no engine answers within ``connect_timeout_s``.
        Unauthenticated: it does not take the key, or has another one.
    """
    tokenizer, templates = await asyncio.to_thread(_read_model, model)
    async with contextlib.AsyncExitStack() as exits:
        context = zmq.asyncio.Context()
        exits.push_async_callback(_terminate, context)
        engine = EngineClient(context, endpoint, config.engine_timeouts, config.stream_window, keys)
        exits.push_async_callback(_cancel, asyncio.create_task(engine.run()))
        renderer = None
        if templates is not None:
            # Its process starts with the first chat.
            renderer = TemplateProcess(templates, config.template_limits)
            exits.push_async_exit(renderer)
        await engine.wait_connected(config.connect_timeout_s)
        yield ClientSession(
            engine,
            tokenizer,
            PromptEncoder(tokenizer, renderer),
            RequestMetrics("" if model is None else model.name),
        )


def _read_model(folder: Path | None) -> tuple[TextTokenizer | None, TemplateFiles | None]:
    if folder is None:
        return None, None
    if not folder.is_dir():
        raise InvalidRequest(
            f"model: expected the folder of the model that is served, got {str(folder)!r}",
            param="model",
        )
    return TextTokenizer.from_folder(folder), read_template_files(folder)


async def _terminate(context: zmq.asyncio.Context) -> None:
    """Blocks for as long as a last message lingers."""
    try:
        await asyncio.to_thread(context.term)
    except RuntimeError:
        # The program is ending, and no thread can be started any more.
        context.term()


async def _cancel(task: asyncio.Task[None]) -> None:
    """Ends ``task``; raises what it had failed with."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.result()
