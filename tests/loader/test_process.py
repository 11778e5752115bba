"""The loader as the supervisor starts it: a process with one document on its standard input."""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.endpoints import RunFolder
from ipc.messages import LoadSent
from tests.adapters import base_model, image_bytes, write_adapter
from tests.loader.scripted_engine import LOADER_EPOCH, ScriptedEngine

BASE = base_model()
DEADLINE_S = 20.0


@contextlib.contextmanager
def loader(run_folder: Path, **config: object) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """A loader's process and what it said of its readiness."""
    read_fd, write_fd = os.pipe()
    envelope = {
        "name": "loader",
        "parent_pid": os.getpid(),
        "epoch": LOADER_EPOCH,
        "ready_fd": write_fd,
        "run_folder": str(run_folder),
        "log_level": "info",
        "config": {"host_tier_bytes": 1 << 20, **config},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "loader"], stdin=subprocess.PIPE, pass_fds=[write_fd]
    )
    try:
        os.close(write_fd)
        assert process.stdin is not None
        process.stdin.write(json.dumps(envelope).encode())
        process.stdin.close()
        assert select.select([read_fd], [], [], DEADLINE_S)[0]
        yield process, json.loads(os.read(read_fd, 4096))
    finally:
        os.close(read_fd)
        process.kill()
        process.wait()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_loader_is_ready_before_there_is_an_engine_and_ends_when_told(run_folder: Path) -> None:
    with loader(run_folder) as (process, readiness):
        assert readiness == {"detail": "host tier of 1048576 bytes"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert not run_folder.exists()


def test_loader_that_compiles_ends_cleanly_when_told(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "empty"))
    with loader(run_folder) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


def test_loader_serves_one_engine_after_the_other(run_folder: Path, tmp_path: Path) -> None:
    expected = image_bytes(BASE, write_adapter(tmp_path / "adapters/a", BASE))

    async def scenario() -> None:
        for epoch in (1, 2):
            engine = ScriptedEngine(RunFolder(run_folder), BASE, epoch=epoch)
            async with asyncio.timeout(DEADLINE_S):
                await engine.meet()
                engine.stage(1, await engine.source(1, tmp_path / "adapters/a"))
                result = (await engine.collect(1))[1]
            assert result.image == expected
            assert isinstance(result.message, LoadSent)
            assert result.message.timing.from_host_tier is (epoch == 2)
            engine.close()

    with loader(run_folder, adapter_roots=[str(tmp_path)]):
        asyncio.run(scenario())


def test_injected_delay_holds_back_a_read(run_folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters/a", BASE)

    async def scenario() -> None:
        engine = ScriptedEngine(RunFolder(run_folder), BASE)
        async with asyncio.timeout(DEADLINE_S):
            await engine.meet()
            engine.stage(1, await engine.source(1, tmp_path / "adapters/a"))
            await engine.collect(1)
            # What was read is told with what the host tier holds, perhaps behind the load's end.
            await engine.until_resident(1)
        (read,) = engine.reads
        assert read.read_s + read.dequantize_s >= 0.2
        engine.close()

    with loader(run_folder, adapter_roots=[str(tmp_path)], inject_read_delay_s=0.2):
        asyncio.run(scenario())


def test_memory_that_is_not_to_be_had_is_said(run_folder: Path) -> None:
    with loader(run_folder, host_tier_bytes=1 << 60) as (process, readiness):
        assert "bytes for --host-tier-memory" in readiness["error"]["message"]
        assert process.wait(DEADLINE_S) == 1
