"""The client for programs without an event loop: the same answers, from any thread."""

import contextlib
import gc
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import api.client
from api.client import SidestreamClient
from ipc.errors import AdapterNotFound, Cancelled, DeadlineExceeded, Unavailable
from ipc.messages import Generate, TokenDelta
from tests.api.client_rig import SyncRig, sync_rig
from tests.api.fake_engine import says, waits
from tests.api.frontend import DEADLINE_S


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(0.001)


def send(rig: SyncRig, *tokens: int) -> None:
    """One step for the last request, sent on the engine's own thread."""

    async def step(engine: object) -> None:
        rig.engine.send(TokenDelta(rig.engine.requests[-1].request_id, list(tokens)))

    rig.loop.run(step)


def test_answers_are_those_of_the_asynchronous_client() -> None:
    with sync_rig(says("hé!")) as rig:
        answer = rig.client.generate("x", max_tokens=5)
        assert "".join(piece.text for piece in rig.client.stream("x")) == answer.text == "hé!"
        messages = [{"role": "user", "content": "x"}]
        assert rig.client.chat(messages).text == rig.client.stream_chat(messages).answer().text
        assert rig.client.detokenize(rig.client.tokenize("né"), skip_special_tokens=True) == "né"
        assert rig.client.load_adapter("a", "/a").name == "a"
        assert [each.name for each in rig.client.list_adapters().adapters] == ["a"]
        assert [each.name for each in rig.client.prefetch(["a"])] == ["a"]
        rig.client.unload_adapter("a")
        with pytest.raises(AdapterNotFound):
            rig.client.unload_adapter("a")
        assert rig.client.engine.engine_epoch == rig.client.health().engine_epoch == 1
        assert rig.client.stats().num_running == 3


def test_threads_share_a_client_and_get_their_own_answers() -> None:
    def echo(request: Generate) -> Iterable[TokenDelta]:
        return says(f"for {request.prompt_token_ids[0]}")(request)

    with sync_rig(echo) as rig, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda number: rig.client.generate([number]).text, range(40))
        assert list(answers) == [f"for {number}" for number in range(40)]


def test_a_stream_that_is_left_or_dropped_is_cancelled() -> None:
    with sync_rig(waits) as rig:
        for count, drop in ((1, False), (2, True)):
            stream = rig.client.stream("x")
            with ThreadPoolExecutor(1) as pool:
                first = pool.submit(next, stream)
                until(lambda count=count: len(rig.engine.requests) == count)  # type: ignore[misc]
                send(rig, 97)
                assert first.result().text == "a"
            if drop:
                del stream, first
                gc.collect()
            else:
                stream.close()
            until(lambda count=count: len(rig.engine.cancelled) == count)  # type: ignore[misc]


def test_a_stream_that_another_thread_closes_ends_its_readers_wait() -> None:
    with sync_rig(waits) as rig, ThreadPoolExecutor(1) as pool:
        stream = rig.client.stream("x")
        reader = pool.submit(next, stream)
        until(lambda: len(rig.engine.requests) == 1)
        stream.close()
        with pytest.raises(Cancelled, match="the stream was closed"):
            reader.result(DEADLINE_S)
        until(lambda: len(rig.engine.cancelled) == 1)


def test_a_client_that_is_dropped_closes_itself_once_its_streams_are() -> None:
    with sync_rig(waits) as rig:
        before = threading.active_count()
        client = SidestreamClient(rig.endpoint)
        stream = client.stream([1])
        del client
        gc.collect()
        assert threading.active_count() > before
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, stream)
            until(lambda: len(rig.engine.requests) == 1)
            send(rig, 97)
            assert first.result(DEADLINE_S).token_ids == [97]
        del stream, first
        gc.collect()
        until(lambda: threading.active_count() == before and len(rig.engine.cancelled) == 1)


def test_a_program_that_ends_within_a_stream_cancels_it_and_is_not_held_up() -> None:
    program = """
import sys
from api.client import SidestreamClient
client = SidestreamClient(sys.argv[1])
stream = client.stream([1])
print(next(stream).token_ids)
"""
    with sync_rig(waits) as rig:
        command = [sys.executable, "-c", program, rig.endpoint]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            until(lambda: len(rig.engine.requests) == 1)
            send(rig, 97)
            printed, _ = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, printed) == (0, "[97]\n")
        until(lambda: len(rig.engine.cancelled) == 1)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_interrupts_the_wait_and_cancels() -> None:
    with sync_rig(waits) as rig:

        def interrupt() -> None:
            until(lambda: len(rig.engine.requests) == 1)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            rig.client.generate("x")
        thread.join()
        until(lambda: len(rig.engine.cancelled) == 1)
        assert rig.client.stats().num_running == 3


def test_a_deadline_ends_a_call() -> None:
    with sync_rig(waits) as rig, pytest.raises(DeadlineExceeded):
        rig.client.generate("x", timeout_s=0.05)


def test_closing_ends_what_other_threads_wait_for() -> None:
    with sync_rig(waits) as rig, ThreadPoolExecutor(1) as pool:
        running = pool.submit(rig.client.generate, "x")
        until(lambda: len(rig.engine.requests) == 1)
        rig.client.close()
        with pytest.raises(Cancelled):
            running.result(DEADLINE_S)
        rig.client.close()
        with pytest.raises(RuntimeError, match="got one that is closed"):
            rig.client.stats()


def test_no_server_is_unavailable_and_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    config = api.client.ClientConfig(connect_timeout_s=0.05)
    with pytest.raises(Unavailable, match="no engine answered"):
        SidestreamClient(f"ipc://{tmp_path}/nobody", config=config)
    assert threading.active_count() == before


def _in_child(client: SidestreamClient, answers: "multiprocessing.Queue[str]") -> None:
    try:
        client.stats()
    except RuntimeError as error:
        answers.put(str(error))
    client.close()


# From Python 3.12 on a fork beside threads is warned of; that it goes well is what is tried here.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_no_client_and_the_parents_goes_on() -> None:
    with sync_rig(says("ok")) as rig:
        forking = multiprocessing.get_context("fork")
        answers: multiprocessing.Queue[str] = forking.Queue()
        child = forking.Process(target=_in_child, args=(rig.client, answers))
        child.start()
        assert "before it forked" in answers.get(timeout=DEADLINE_S)
        child.join(DEADLINE_S)
        assert child.exitcode == 0
        assert rig.client.generate("x").text == "ok"


def test_the_modules_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = re.findall(r"^(?:>>>|\.\.\.) (.*)$", api.client.__doc__ or "", re.MULTILINE)
    with sync_rig(says("hi there")) as rig:
        endpoint = rig.endpoint.removeprefix("ipc://")
        monkeypatch.setattr("api.async_client.find_endpoint", lambda server: f"ipc://{endpoint}")
        printed = io.StringIO()
        names = {"model_folder": Path(endpoint).parent, "adapter_folder": tmp_path}
        with contextlib.redirect_stdout(printed):
            exec("\n".join(lines), names)
        assert printed.getvalue() == "hi there"
        assert [request.adapter for request in rig.engine.requests] == ["shout", None]
