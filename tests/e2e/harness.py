"""A whole server under test: started as a person would, watched from outside."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

DEADLINE_S = 60.0
ROLES = ("loader", "engine", "api")


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Returns once ``condition`` holds; fails the test, naming ``what``, if it never does."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.01)


class Server:
    """``sidestream serve`` with these arguments, in a folder of its own."""

    def __init__(self, arguments: list[str], loader_overrides: dict[str, Any]) -> None:
        self._log_file = tempfile.NamedTemporaryFile(mode="w+", suffix=".log")  # noqa: SIM115
        self.run_parent = tempfile.TemporaryDirectory(prefix="ss")
        environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": self.run_parent.name,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "tests.e2e.serve"]
        command += [msgspec.json.encode(loader_overrides).decode(), "serve", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log_file, env=environment, text=True
        )
        self.url = self._wait_for_url()
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)

    def _wait_for_url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"http://\S+?:\d+", line)
            if found:
                return found.group()
        self.process.wait(DEADLINE_S)
        raise AssertionError(f"the server did not start:\n{self.log}")

    @property
    def log(self) -> str:
        """Everything that the server's processes have logged."""
        return Path(self._log_file.name).read_text()

    def processes(self) -> dict[str, psutil.Process]:
        """The living children by role."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                command = child.cmdline()
            except psutil.NoSuchProcess:
                continue
            for role in ROLES:
                if command[1:3] == ["-m", role] and child.status() != psutil.STATUS_ZOMBIE:
                    found[role] = child
        return found

    def kill(self, role: str) -> int:
        """SIGKILLs one child; returns its pid."""
        victim = self.processes()[role]
        victim.kill()
        return victim.pid

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = self.http.get("/metrics").raise_for_status().text
        samples = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert samples, f"no metric called {name}"
        return sum(float(sample) for sample in samples)

    def complete(self, model: str, prompt: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 64, **fields}
        return self.http.post("/v1/completions", json=body)

    def answer(self, model: str, prompt: str, **fields: Any) -> str:
        """The text of one completion."""
        response = self.complete(model, prompt, **fields)
        assert response.status_code == 200, response.text
        text = response.json()["choices"][0]["text"]
        assert isinstance(text, str)
        return text

    def stream_gaps(self, model: str, prompt: str, **fields: Any) -> Iterator[tuple[float, float]]:
        """Yields ``(time, gap)`` in seconds for every token of a stream but the first."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "stream": True, **fields}
        last_s: float | None = None
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return
                event = msgspec.json.decode(line[len("data: ") :])
                assert "error" not in event, event
                now_s = time.monotonic()
                if last_s is not None:
                    yield now_s, now_s - last_s
                last_s = now_s
        raise AssertionError("the stream ended without [DONE]")

    def stop(self) -> None:
        """Stops the server in order and checks that nothing of it is left."""
        self.http.close()
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(DEADLINE_S)
        finally:
            for child in children:
                if child.is_running():
                    child.kill()
        assert status == 0, f"ended with status {status}:\n{self.log}"
        assert not any(child.is_running() for child in children)
        assert os.listdir(self.run_parent.name) == []
        self.close()

    def kill_all(self) -> None:
        """Ends whatever is left, without ceremony."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
        self.http.close()
        self.close()

    def close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log_file.close()
        self.run_parent.cleanup()


@contextmanager
def serving(*arguments: str, **loader_overrides: Any) -> Iterator[Server]:
    """A server for the length of the block; its log is shown when the block fails."""
    server = Server(list(arguments), loader_overrides)
    try:
        yield server
    except BaseException:
        print(server.log, file=sys.stderr)
        server.kill_all()
        raise
    server.stop()
