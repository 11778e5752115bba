"""A small OpenAI-compatible server that answers as its test says, on the test's own event loop."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self, TypeVar

import msgspec
import uvloop

from tools.bench.completion_client import CompletionClient
from tools.bench.http_exchange import Address
from tools.bench.prompts import PromptForm

DEADLINE_S = 20.0

T = TypeVar("T")

# Answers one request: the decoded body, and where to write.
Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def run(test: Coroutine[Any, Any, T]) -> T:
    """What a test's coroutine returns, on the loop that the bench uses."""
    return uvloop.run(asyncio.wait_for(test, DEADLINE_S))


class ScriptedServer:
    """Answers completions with ``answer`` and other paths with ``pages``; notes all it is asked."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer or whole_answer
        self.pages: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = Address("127.0.0.1", port, tls=False, prefix="")
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    @property
    def client(self) -> CompletionClient:
        return CompletionClient(self.address, "base", PromptForm.TOKENS)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            content = await reader.readexactly(int(fields["content-length"]))
            path = head.split(" ")[1]
            body: dict[str, Any] = msgspec.json.decode(content) if content else {}
            self.asked.append((path, body))
            if path == "/v1/completions":
                await self.answer(body, writer)
            else:
                refuse(writer, *self.pages.get(path, (404, "no such path")))
            await writer.drain()
        except ConnectionError:
            pass  # The client left, as its test wanted.
        finally:
            writer.close()


def refuse(writer: asyncio.StreamWriter, status: int, text: str, *fields: str) -> None:
    """A whole answer of this status, with more header ``fields``."""
    head = [f"HTTP/1.1 {status} X", f"content-length: {len(text.encode())}", *fields, "", ""]
    writer.write("\r\n".join(head).encode() + text.encode())


def begin(writer: asyncio.StreamWriter) -> None:
    """The head of a stream."""
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )


def send(writer: asyncio.StreamWriter, event: dict[str, Any] | str) -> None:
    """One event, as JSON unless it is text."""
    text = event.encode() if isinstance(event, str) else msgspec.json.encode(event)
    data = b"data: " + text + b"\n\n"
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def end(writer: asyncio.StreamWriter) -> None:
    send(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")


def token(total: int, text: str = "x") -> dict[str, Any]:
    """An event after which the answer has ``total`` tokens."""
    return {
        "choices": [{"index": 0, "text": text}],
        "usage": {"prompt_tokens": 7, "completion_tokens": total},
    }


async def whole_answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """As many tokens as were asked for."""
    begin(writer)
    for number in range(body["max_tokens"]):
        send(writer, token(number + 1))
    end(writer)
