"""The servers that are compared: those that run already, and those that are started for it."""

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from api.config import ApiConfig
from ipc.errors import InvalidRequest, SidestreamError, Unavailable
from tools.child import describe_status
from tools.http_client import HttpClient
from tools.serve import reserve_port

_PROJECT_FOLDER = Path(__file__).resolve().parent.parent.parent
_HOST = "127.0.0.1"
_API_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(ApiConfig)}
DEFAULT_URL = f"http://{_API_DEFAULTS['host']}:{_API_DEFAULTS['port']}"
_POLL_INTERVAL_S = 0.1
_READY_TIMEOUT_S = 5.0
# The supervisor's own times for its children, and some more.
_STOP_TIMEOUT_S = 60.0
_LOG_LINES = 15


@dataclass(frozen=True)
class Target:
    """A server by name: its URL, or the options with which to start one."""

    name: str
    url: str | None
    serve_options: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        return self.url or f"sidestream serve {shlex.join(self.serve_options)}"


def parse_target(text: str) -> Target:
    """``NAME=http://…``, or ``NAME=options of sidestream serve``.

    Raises:
        InvalidRequest: no name, nothing after it, or an open quotation mark.
    """
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not (name and equals and value):
        raise InvalidRequest(f"expected NAME=URL or NAME='options of serve', got {text!r}")
    if value.startswith(("http://", "https://")):
        return Target(name, value)
    try:
        return Target(name, None, tuple(shlex.split(value)))
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}: {value}") from error


@contextlib.contextmanager
def reachable(
    target: Target, start_timeout_s: float, log_path: Path | None = None
) -> Iterator[str]:
    """The target's URL. A server that is started here is ready, and stopped in order afterwards.

    Its log is left at ``log_path``, or nowhere.

    Raises:
        Unavailable: it did not start, or did not stop in order; with the end of its log.
    """
    if target.url is not None:
        yield target.url
        return
    with reserve_port(_HOST, 0) as port, _log_file(log_path) as log:
        url = f"http://{_HOST}:{port}"
        process = _spawn([*target.serve_options, "--host", _HOST, "--port", str(port)], log)
        try:
            _wait_until_ready(process, url, start_timeout_s, log)
            yield url
        finally:
            _stop(process)
        if process.returncode != 0:
            raise Unavailable(f"the server {_ending(process, log)} when it was stopped")


def _log_file(path: Path | None) -> IO[bytes]:
    if path is None:
        return tempfile.NamedTemporaryFile(prefix="sidestream-bench-", suffix=".log")
    return path.open("wb")


def _spawn(options: list[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    path = os.environ.get("PYTHONPATH")
    return subprocess.Popen(
        [sys.executable, "-m", "tools.bench.serve_child", str(os.getpid()), *options],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={
            **os.environ,
            "PYTHONPATH": f"{_PROJECT_FOLDER}{os.pathsep}{path}" if path else str(_PROJECT_FOLDER),
            "PYTHONSAFEPATH": "1",
        },
        # A Ctrl-C is ours: we stop the server in order.
        process_group=0,
    )


def _wait_until_ready(
    process: "subprocess.Popen[bytes]", url: str, start_timeout_s: float, log: IO[bytes]
) -> None:
    client = HttpClient(url, _READY_TIMEOUT_S)
    deadline_s = time.monotonic() + start_timeout_s
    while True:
        with contextlib.suppress(SidestreamError):
            client.get("/ready")
            return
        if process.poll() is not None:
            raise Unavailable(f"the server {_ending(process, log)} before it was ready")
        if time.monotonic() > deadline_s:
            raise Unavailable(f"the server was not ready within {start_timeout_s:g} s")
        time.sleep(_POLL_INTERVAL_S)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Asks it to end, and kills it if it does not; its children die with it."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ending(process: "subprocess.Popen[bytes]", log: IO[bytes]) -> str:
    """How it ended, and what it said last."""
    return describe_status(process.returncode) + log_tail(Path(log.name))


def log_tail(path: Path) -> str:
    """The last lines of a server's log, each indented on a line of its own."""
    lines = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return "".join(f"\n  {line}" for line in lines) + "\n"
