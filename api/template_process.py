"""Chat templates in a process of their own, which may neither go on for ever nor grow.

A template is a program that came with a model: one loop or one multiplication in it can take all
the time or memory there is, and nothing within a process keeps it from that. Besides, long chats
are rendered beside the event loop here, and not on it.
"""

import asyncio
import contextlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, assert_never

import msgspec

from api.template_files import TemplateFiles
from ipc.errors import InvalidRequest, Unavailable, error_from_info
from ipc.messages import (
    LoadTemplates,
    PromptRendered,
    RenderChat,
    TemplateAnswer,
    TemplateRefused,
    TemplatesLoaded,
)

logger = logging.getLogger(__name__)

# From its start until it has its templates; a machine that has just begun is slow.
START_TIMEOUT_S = 60.0
# What a character takes in JSON at most: an escape of six, or two of them above U+FFFF.
MAX_CHAR_BYTES = 12
# The rest of an answer's line.
ENVELOPE_BYTES = 64 << 10


class ChatRenderer(Protocol):
    """Makes prompts of chats."""

    async def render(self, chat: RenderChat) -> str:
        """The prompt. Raises ``SidestreamError`` when there is none."""
        ...


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may take; ``max_memory_bytes`` beyond what its process begins with."""

    timeout_s: float
    max_memory_bytes: int
    max_prompt_chars: int


class TemplateProcess:
    """Implements ``ChatRenderer``. Chats are rendered one after the other.

    The child lives from the beginning to the end of ``async with``. One that dies, or takes too
    long and is killed, is followed by another when the next chat comes.
    """

    def __init__(self, files: TemplateFiles, limits: TemplateLimits) -> None:
        self._limits = limits
        self._load = LoadTemplates(
            dict(files.sources),
            dict(files.special_tokens),
            limits.max_memory_bytes,
            limits.max_prompt_chars,
        )
        self._turn = asyncio.Lock()
        self._child: Process | None = None
        self._decoder = msgspec.json.Decoder(TemplateAnswer)

    async def __aenter__(self) -> Self:
        """Raises as ``render`` does; ``InvalidRequest``, too, for a source that is no template."""
        async with self._turn:
            await self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()

    async def render(self, chat: RenderChat) -> str:
        """The prompt.

        Raises:
            InvalidRequest: the template refuses the chat, or takes too much time or memory.
            Unavailable: the child died.
        """
        async with self._turn:
            child = self._child
            if child is None or child.returncode is not None:
                child = await self._start()
            async with self._guarded(self._limits.timeout_s):
                answer = await self._ask(child, chat)
        match answer:
            case PromptRendered(prompt):
                return prompt
            case TemplateRefused(error):
                raise error_from_info(error)
            case TemplatesLoaded():
                raise AssertionError("a chat was answered as if it were templates")
            case _:
                assert_never(answer)

    async def _start(self) -> Process:
        async with self._guarded(START_TIMEOUT_S):
            child = self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "api.template_worker",
                str(os.getpid()),
                stdin=PIPE,
                stdout=PIPE,
                limit=self._limits.max_prompt_chars * MAX_CHAR_BYTES + ENVELOPE_BYTES,
            )
            answer = await self._ask(child, self._load)
            if isinstance(answer, TemplateRefused):
                raise error_from_info(answer.error)
            return child

    async def _ask(
        self, child: Process, call: LoadTemplates | RenderChat
    ) -> TemplatesLoaded | PromptRendered | TemplateRefused:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(msgspec.json.encode(call) + b"\n")
        await child.stdin.drain()
        line = await child.stdout.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("the answer has no end")
        answer: TemplatesLoaded | PromptRendered | TemplateRefused = self._decoder.decode(line)
        return answer

    @contextlib.asynccontextmanager
    async def _guarded(self, timeout_s: float) -> AsyncIterator[None]:
        """Bounds the time. After any exception the child's next answer may not be the one to the
        next call: it is ended."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except BaseException as error:
            await self._end()
            match error:
                case TimeoutError():
                    message = f"did not end within {timeout_s:g} s"
                    logger.warning("a chat template %s: its process was killed", message)
                    raise InvalidRequest(
                        f"the model's chat template {message}", param="messages"
                    ) from None
                case ConnectionError():
                    logger.error("the chat templates' process died: %s", error)
                    raise Unavailable(
                        "the process of the model's chat template died", retry_after_s=1.0
                    ) from error
            raise

    async def _end(self) -> None:
        """Kills the child: it has nothing to finish or to keep."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
