"""The supervisor over scripted children: they are real processes that speak the real protocol."""

import asyncio
import contextlib
import logging
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from ipc.endpoints import RunFolder
from ipc.errors import Unavailable
from tests.tools.scripted import Script
from tools.child import ChildSpec
from tools.supervisor import ServerSpec, Supervisor

pytestmark = pytest.mark.timed

DEADLINE_S = 20.0
ARGV = (sys.executable, str(Path(__file__).with_name("scripted.py")))


class Server:
    """A supervisor over three scripted children, and what they write down."""

    def __init__(self, folder: Path) -> None:
        self.journal = folder / "journal"
        self.journal.touch()
        # Not below ``folder``: a Unix socket's path is short.
        self.parent = Path(tempfile.mkdtemp(prefix="supervisor-"))
        self.ready = asyncio.Event()

    def spec(
        self, name: str, *, start_s: float = DEADLINE_S, stop_s: float = DEADLINE_S, **script: Any
    ) -> ChildSpec:
        return ChildSpec(name, ARGV, Script(str(self.journal), **script), start_s, stop_s)

    def supervisor(self, **changed: ChildSpec) -> Supervisor:
        specs = {name: self.spec(name) for name in ("loader", "engine", "api")} | changed
        return Supervisor(
            ServerSpec(**specs),
            RunFolder.create([self.parent]),
            "warning",
            lambda seconds: self.ready.set(),
        )

    def lines(self) -> list[str]:
        return self.journal.read_text().splitlines()

    def pid(self, name: str, epoch: int) -> int:
        match = re.search(rf"^{name} {epoch} started (\d+)$", self.journal.read_text(), re.M)
        assert match is not None
        return int(match[1])

    async def written(self, pattern: str) -> None:
        """Waits until a line that matches ``pattern`` as a whole was written."""
        await until(lambda: any(re.fullmatch(pattern, line) for line in self.lines()), pattern)


async def until(is_true: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not is_true():
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"waited {DEADLINE_S:g} s for: {what}")


def children_of(pid: int) -> list[int]:
    """The process ids of a single-threaded process's own children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    # A server that other tests share may be running.
    others = set(children_of(os.getpid()))
    server = Server(tmp_path)
    yield server
    assert list(server.parent.iterdir()) == [], "a run folder was left behind"
    server.parent.rmdir()
    left = set(children_of(os.getpid())) - others
    assert not left, "a process was left behind"


def play(supervisor: Supervisor, script: Coroutine[Any, Any, None]) -> bool:
    """Runs ``script`` beside the supervisor, then stops it; what ``Supervisor.run`` returned."""

    async def both() -> bool:
        running = asyncio.create_task(supervisor.run())
        playing = asyncio.create_task(script)
        await asyncio.wait({running, playing}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            supervisor.stop()
        stopped_in_order = await running
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await playing
        return stopped_in_order

    return uvloop.run(both())


def test_a_server_is_ready_when_every_child_is_and_stops_in_order(server: Server) -> None:
    assert play(server.supervisor(), server.ready.wait()) is True  # type: ignore[arg-type]
    assert [line for line in server.lines() if line.endswith("stopped")] == [
        "api 1 stopped",
        "engine 1 stopped",
        "loader 1 stopped",
    ]


def test_a_killed_loader_is_back_at_once_in_a_new_epoch(server: Server) -> None:
    async def script() -> None:
        await server.ready.wait()
        os.kill(server.pid("loader", 1), signal.SIGKILL)
        begin_s = time.monotonic()
        await server.written(r"loader 2 started \d+")
        assert time.monotonic() - begin_s < 5.0

    play(server.supervisor(), script())
    assert not any(line.startswith(("engine 2", "api 2")) for line in server.lines())


def test_a_death_is_logged_with_its_signal(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def script() -> None:
        await server.ready.wait()
        os.kill(server.pid("api", 1), signal.SIGKILL)
        await server.written(r"api 2 started \d+")

    with caplog.at_level(logging.INFO, "tools.supervisor"):
        play(server.supervisor(), script())
    pid = server.pid("api", 1)
    assert f"the api (pid {pid}) was killed by SIGKILL" in caplog.messages
    assert "restarting the api at once" in caplog.messages


def test_a_child_that_dies_again_quickly_waits_longer(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    async def script() -> None:
        await server.ready.wait()
        os.kill(server.pid("engine", 1), signal.SIGKILL)
        await server.written(r"engine 4 started \d+")

    with caplog.at_level(logging.INFO, "tools.supervisor"):
        play(
            server.supervisor(engine=server.spec("engine", crash_in=(2,), refuse_in=(3,))), script()
        )
    restarts = [line for line in caplog.messages if line.startswith("restarting")]
    assert restarts == [
        "restarting the engine at once",
        "restarting the engine in 0.25 s",
        "restarting the engine in 0.5 s",
    ]
    assert "the engine could not start: no memory is left" in caplog.messages


def test_the_engine_learns_of_each_loader_and_a_new_engine_of_the_living_one(
    server: Server,
) -> None:
    async def script() -> None:
        await server.written("engine 1 knows loader 1")
        await server.ready.wait()
        os.kill(server.pid("loader", 1), signal.SIGKILL)
        await server.written(r"loader 2 started \d+")
        os.kill(server.pid("engine", 1), signal.SIGKILL)
        await server.written("engine 2 knows loader 2")

    play(server.supervisor(engine=server.spec("engine", listen=True)), script())


@pytest.mark.parametrize("name", ["loader", "engine", "api"])
def test_a_first_start_that_is_refused_is_one_line(server: Server, name: str) -> None:
    failing = server.spec(name, refuse_in=(1,))
    with pytest.raises(Unavailable) as caught:
        uvloop.run(server.supervisor(**{name: failing}).run())
    assert str(caught.value) == f"the {name} could not start: no memory is left"


def test_a_child_that_ends_before_it_was_ready_ends_the_start(server: Server) -> None:
    failing = server.spec("engine", crash_in=(1,))
    with pytest.raises(Unavailable, match=r"^the engine ended with status 3 before it was ready$"):
        uvloop.run(server.supervisor(engine=failing).run())


def test_a_child_that_is_not_ready_in_its_time_is_named(server: Server) -> None:
    silent = server.spec("api", start_s=0.5, stay_silent_in=(1,))
    with pytest.raises(Unavailable, match=r"^the api was not ready within 0\.5 s$"):
        uvloop.run(server.supervisor(api=silent).run())


def test_a_child_that_can_not_be_spawned_is_named(server: Server) -> None:
    missing = ChildSpec("loader", ("/no/such/program",), Script(str(server.journal)))
    with pytest.raises(Unavailable, match=r"^the loader could not start: No such file"):
        uvloop.run(server.supervisor(loader=missing).run())


def test_a_restart_that_is_not_ready_in_its_time_is_tried_again(server: Server) -> None:
    async def script() -> None:
        await server.ready.wait()
        os.kill(server.pid("loader", 1), signal.SIGKILL)
        await server.written(r"loader 3 started \d+")

    slow = server.spec("loader", start_s=1.5, stay_silent_in=(2,))
    assert play(server.supervisor(loader=slow), script())


def test_a_child_that_ignores_sigterm_is_killed_after_its_time(server: Server) -> None:
    stubborn = server.spec("engine", stop_s=0.2, ignore_sigterm=True)
    supervisor = server.supervisor(engine=stubborn)
    assert play(supervisor, server.ready.wait()) is False  # type: ignore[arg-type]
    assert "loader 1 stopped" in server.lines()


def test_a_second_signal_kills_what_still_runs(server: Server) -> None:
    stubborn = server.spec("engine", ignore_sigterm=True)
    supervisor = server.supervisor(engine=stubborn)
    begin_s = time.monotonic()

    async def script() -> None:
        await server.ready.wait()
        engine = os.pidfd_open(server.pid("engine", 1))
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: "api 1 stopped" in server.lines(), "the stop to begin")

        def has_ended_at_last() -> bool:
            if select.select([engine], [], [], 0)[0]:
                return True
            # Never once it has ended: soon after that, nobody but the interpreter takes a signal.
            os.kill(os.getpid(), signal.SIGINT)
            return False

        await until(has_ended_at_last, "the end of the engine")
        os.close(engine)

    assert play(supervisor, script()) is False
    assert time.monotonic() - begin_s < DEADLINE_S


def test_a_signal_that_arrives_twice_at_once_is_one(server: Server) -> None:
    async def script() -> None:
        await server.ready.wait()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    assert play(server.supervisor(), script()) is True


def test_a_stop_during_the_start_is_in_order(server: Server) -> None:
    async def script() -> None:
        await server.written(r"engine 1 started \d+")

    assert play(server.supervisor(engine=server.spec("engine", stay_silent_in=(1,))), script())
    assert not server.ready.is_set()


@pytest.mark.parametrize("moment", [r"api 1 started \d+", r"loader 1 started \d+"])
def test_a_killed_supervisor_leaves_no_child_and_no_folder(server: Server, moment: str) -> None:
    program = f"""
import sys, uvloop
from pathlib import Path
from tests.tools.test_supervisor import Server
server = Server(Path({str(server.journal.parent)!r}))
server.parent.rmdir()
server.parent = Path({str(server.parent)!r})
uvloop.run(server.supervisor(engine=server.spec("engine", listen=True)).run())
"""
    supervisor = subprocess.Popen([sys.executable, "-c", program])

    async def kill_and_wait() -> None:
        await server.written(moment)
        children = [os.pidfd_open(pid) for pid in children_of(supervisor.pid)]
        supervisor.kill()
        supervisor.wait()
        for pidfd in children:
            assert select.select([pidfd], [], [], DEADLINE_S)[0], "a child outlived its supervisor"
            os.close(pidfd)
        await until(lambda: not any(server.parent.iterdir()), "the end of the run folder")

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(kill_and_wait())
