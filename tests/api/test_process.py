"""``python -m api``, as the supervisor starts it."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import msgspec

from api.__main__ import listen
from api.config import ApiConfig
from ipc.endpoints import RunFolder
from ipc.messages import Epoch
from ipc.process import ChildEnvelope, Readiness
from tests.api.fake_engine import FakeEngine, says, waits
from tests.api.frontend import on_loop, until
from tools.tiny_model.tokenizer import save_tokenizer


class ApiProcess:
    """The child, and what it says over its readiness pipe."""

    def __init__(self, folder: str, config: ApiConfig) -> None:
        self._read_fd, write_fd = os.pipe()
        envelope = ChildEnvelope(
            "api",
            os.getpid(),
            Epoch(1),
            write_fd,
            folder,
            "INFO",
            msgspec.Raw(msgspec.json.encode(config)),
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api"], stdin=subprocess.PIPE, pass_fds=[write_fd]
        )
        os.close(write_fd)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(envelope))
        self.process.stdin.close()

    async def readiness(self) -> Readiness | None:
        """Its one line; None when it ended without one."""

        def read() -> bytes:
            with os.fdopen(self._read_fd, "rb") as pipe:
                return pipe.readline()

        line = await asyncio.to_thread(read)
        return msgspec.json.decode(line, type=Readiness) if line else None

    async def ended(self) -> int:
        await until(lambda: self.process.poll() is not None)
        return self.process.wait()


@asynccontextmanager
async def run_folder() -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        yield folder
        # The process may have removed it, as the last one to leave.
        Path(folder).mkdir(exist_ok=True)


@asynccontextmanager
async def engine_in(folder: str) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(RunFolder(Path(folder)).rpc_endpoint, says("ok"))
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def config(folder: str, port: int = 0, connect_timeout_s: float = 10.0) -> ApiConfig:
    return ApiConfig(
        model=folder,
        served_model_name="base",
        port=port,
        drain_s=0.2,
        connect_timeout_s=connect_timeout_s,
    )


@on_loop
async def test_it_serves_when_it_says_so_and_ends_with_status_0_on_sigterm() -> None:
    async with run_folder() as folder, engine_in(folder) as engine:
        api = ApiProcess(folder, config(folder))
        readiness = await api.readiness()
        assert readiness is not None and readiness.error is None
        async with httpx.AsyncClient(base_url=f"http://{readiness.detail}") as http:
            body = {"model": "base", "prompt": "x"}
            answer = (await http.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["text"] == "ok"
            asked = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
            answer = (await http.post("/v1/chat/completions", json=asked)).json()
            assert answer["choices"][0]["message"]["content"] == "ok"
            engine.script = waits
            waiting = asyncio.create_task(http.post("/v1/completions", json=body))
            await until(lambda: len(engine.requests) == 3)
            api.process.send_signal(signal.SIGTERM)
            assert (await waiting).status_code == 503
        assert await api.ended() == 0


@on_loop
async def test_an_address_in_use_is_said_to_the_supervisor() -> None:
    with listen("127.0.0.1", 0) as taken:
        async with run_folder() as folder, engine_in(folder):
            port = taken.getsockname()[1]
            api = ApiProcess(folder, config(folder, port))
            readiness = await api.readiness()
            assert readiness is not None and readiness.error is not None
            assert f"can not listen at 127.0.0.1:{port}" in readiness.error.message
            assert await api.ended() == 1


@on_loop
async def test_a_broken_tokenizer_is_said_to_the_supervisor() -> None:
    async with run_folder() as folder:
        (Path(folder) / "tokenizer.json").write_text("{")
        api = ApiProcess(folder, config(folder))
        readiness = await api.readiness()
        assert readiness is not None and readiness.error is not None
        assert "tokenizer.json" in readiness.error.message
        assert await api.ended() == 1


@on_loop
async def test_a_broken_chat_template_is_said_to_the_supervisor() -> None:
    async with run_folder() as folder, engine_in(folder):
        (Path(folder) / "chat_template.jinja").write_text("{% if %}")
        api = ApiProcess(folder, config(folder))
        readiness = await api.readiness()
        assert readiness is not None and readiness.error is not None
        assert "chat template 'default', line 1" in readiness.error.message
        assert await api.ended() == 1


@on_loop
async def test_without_an_engine_it_ends_after_its_time() -> None:
    async with run_folder() as folder:
        api = ApiProcess(folder, config(folder, connect_timeout_s=0.1))
        assert await api.readiness() is None
        assert await api.ended() == 1


def test_it_imports_neither_torch_nor_the_other_processes() -> None:
    code = "import sys, api.__main__; print({'torch', 'engine', 'loader'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
