"""Whatever dies, every accepted request gets one answer, and nothing is left behind."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import DEADLINE_S, Server, serving, wait_until
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


def test_a_loader_killed_in_the_middle_of_a_load_stops_no_stream_and_loses_no_request(
    tiny_model: TinyModel,
) -> None:
    prompt = tiny_model.prompts[0]
    with serving(*serve_arguments(tiny_model), inject_read_delay_s=1.0) as server:
        server.answer("shout", prompt)
        gaps: list[float] = []
        done = threading.Event()

        def bystander() -> None:
            while not done.is_set():
                stream = server.stream_gaps("shout", prompt, max_tokens=150, ignore_eos=True)
                gaps.extend(gap for _, gap in stream)

        stream = threading.Thread(target=bystander)
        stream.start()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.answer, "json", prompt)
            wait_until(
                lambda: server.metric("vllm:num_requests_waiting") == 1, "json waits for its load"
            )
            killed = server.kill("loader")
            assert waiting.result(DEADLINE_S) == tiny_model.answers["json"][0]
        num_gaps = len(gaps)
        wait_until(lambda: len(gaps) > num_gaps + 10, "the stream goes on")
        done.set()
        stream.join()
        assert server.processes()["loader"].pid != killed
        assert max(gaps) < 0.5
        # The engine never noticed: it is the same process, and its other adapters still answer.
        assert "engine" in server.processes()
        assert server.answer("reverse", prompt) == tiny_model.answers["reverse"][0]


def test_a_killed_engine_fails_its_requests_with_503_and_comes_back_with_every_adapter(
    tiny_model: TinyModel,
) -> None:
    prompt = tiny_model.prompts[1]
    with serving(*serve_arguments(tiny_model), inject_read_delay_s=0.2) as server:
        pirate = {"lora_name": "late", "lora_path": str(tiny_model.adapters["pirate"])}
        server.http.post("/v1/load_lora_adapter", json=pirate).raise_for_status()
        gone = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "reverse"})
        gone.raise_for_status()
        loader = server.processes()["loader"].pid

        with ThreadPoolExecutor(4) as pool:
            running = [
                pool.submit(server.complete, "tiny", prompt, max_tokens=180, ignore_eos=True)
                for _ in range(3)
            ]
            wait_until(
                lambda: server.metric("vllm:num_requests_running") >= 1, "requests are running"
            )
            server.kill("engine")
            responses = [future.result(DEADLINE_S) for future in running]
        assert {response.status_code for response in responses} <= {200, 503}
        failed = [response for response in responses if response.status_code == 503]
        assert failed
        assert all(response.headers["retry-after"] for response in failed)

        wait_until(lambda: server.http.get("/ready").status_code == 200, "the server is ready")
        for voice in ("shout", "json", "pirate"):
            assert server.answer(voice, prompt) == tiny_model.answers[voice][1]
        assert server.answer("late", prompt) == tiny_model.answers["pirate"][1]
        assert server.complete("reverse", prompt).status_code == 404
        assert server.processes()["loader"].pid == loader


def test_a_stream_cut_off_by_the_engines_death_ends_with_an_error_event(
    tiny_model: TinyModel,
) -> None:
    with serving(*serve_arguments(tiny_model)) as server:
        body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 200,
                "ignore_eos": True}  # fmt: skip
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.kill("engine")
            rest = [line for line in lines if line]
        assert rest[-1].startswith('data: {"error"') or rest[-2].startswith('data: {"error"')
        wait_until(lambda: server.http.get("/ready").status_code == 200, "the server is ready")


def test_a_killed_frontend_leaves_no_request_in_the_engine(tiny_model: TinyModel) -> None:
    with serving(*serve_arguments(tiny_model)) as server:

        def doomed() -> None:
            with pytest.raises(httpx.HTTPError):
                server.complete("tiny", "x", max_tokens=200, ignore_eos=True).raise_for_status()

        asking = threading.Thread(target=doomed)
        asking.start()
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1, "the request runs")
        server.kill("api")
        asking.join()

        def is_idle() -> bool:
            try:
                return server.metric("vllm:num_requests_running") == 0
            except (httpx.HTTPError, AssertionError):
                return False

        wait_until(is_idle, "the frontend is back and the engine is idle")
        assert server.answer("shout", tiny_model.prompts[2]) == tiny_model.answers["shout"][2]


def test_a_killed_supervisor_leaves_nothing_behind(tiny_model: TinyModel) -> None:
    server = Server(serve_arguments(tiny_model), {})
    try:
        children = list(server.processes().values())
        assert len(children) == 3
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(DEADLINE_S)
        _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
        assert not alive
        assert os.listdir(server.run_parent.name) == []
    finally:
        server.kill_all()
