"""An HTTP server of files in memory that can be told to fail."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FileServer:
    """``files`` by path. Each of ``cuts`` ends one GET of a path after so many bytes.

    ``answers`` are statuses, and headers, that a path is answered with instead of a file.
    ``requests`` are the methods and paths that came, with the range asked for.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    knows_ranges: bool = True
    has_tags: bool = True
    port: int = 0
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    seen_headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, path: str) -> list[str]:
        """The ranges of all GETs of ``path``, in order."""
        return [asked for method, got, asked in self.requests if (method, got) == ("GET", path)]


def tag_of(payload: bytes) -> str:
    return f'"{hashlib.sha256(payload).hexdigest()[:16]}"'


@contextmanager
def file_server(**options: Any) -> Iterator[FileServer]:
    """The server, on loopback, for as long as its context."""
    served = FileServer(**options)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            asked = self.headers.get("range", "")
            served.requests.append((self.command, self.path, asked))
            served.seen_headers.append(dict(self.headers.items()))
            if self.path in served.answers:
                status, headers = served.answers[self.path]
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            payload = served.files.get(self.path)
            if payload is None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, tag = 0, tag_of(payload)
            if asked and served.knows_ranges and self.headers.get("if-range", tag) == tag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(payload) - 1}/{len(payload)}"
                )
            else:
                self.send_response(200)
            if served.has_tags:
                self.send_header("ETag", tag)
            said = {"Content-Length": str(len(payload) - start)}
            for name, value in (said | served.headers.get(self.path, {})).items():
                self.send_header(name, value)
            self.end_headers()
            if not with_body:
                return
            cuts = served.cuts.get(self.path)
            if cuts:
                self.wfile.write(payload[start : start + cuts.pop(0)])
                self.wfile.flush()
                self.close_connection = True
            else:
                self.wfile.write(payload[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
