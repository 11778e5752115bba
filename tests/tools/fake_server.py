"""A server that answers what a test has prepared."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

MODELS = """{"object": "list", "data": [
    {"id": "tiny", "root": "/tiny", "parent": null},
    {"id": "shout", "root": "/shout", "parent": "tiny"},
    {"id": "quiet", "root": "quiet", "parent": "tiny"}
]}"""
ADAPTERS = """{"object": "list", "data": [
    {"id": "shout", "path": "/shout", "rank": 16, "bytes": 83900000, "residency": "gpu",
     "pinned": true, "num_requests_running": 2, "num_requests_waiting": 1},
    {"id": "quiet", "path": "quiet", "rank": null, "bytes": null, "residency": "disk",
     "pinned": false, "num_requests_running": 0, "num_requests_waiting": 0}
]}"""


class FakeServer(ThreadingHTTPServer):
    """``answers`` has status and body by path; ``asked`` what was posted, ``keys`` what with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, msgspec.json.decode(body)))
        self._answer()

    def _answer(self) -> None:
        self.server.keys.append(self.headers["authorization"])
        status, body = self.server.answers[self.path]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A server on a thread of its own."""
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def chat_events(*pieces: str) -> str:
    """A chat's streamed answer, in these pieces."""
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    lines = [f"data: {msgspec.json.encode(event).decode()}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n"])
