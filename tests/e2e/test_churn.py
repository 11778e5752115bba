"""A minute of everything at once: loads, evictions, registrations and a loader that keeps dying."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import Server, serving
from tools.tiny_model.cache import TinyModel

pytestmark = [pytest.mark.e2e, pytest.mark.long]

SECONDS = 60.0
NUM_CLIENTS = 12


def ask_until(server: Server, tiny_model: TinyModel, end_s: float, seed: int) -> int:
    """Asks random questions of random adapters; returns how many, all of them answered right."""
    chooser = random.Random(seed)
    num_asked = 0
    while time.monotonic() < end_s:
        voice = chooser.choice((None, *tiny_model.adapters))
        question = chooser.randrange(len(tiny_model.prompts))
        prompts = chooser.choice((tiny_model.prompts, tiny_model.long_prompts))
        answer = server.answer(voice or "tiny", prompts[question])
        assert answer == tiny_model.answers[voice][question], (seed, voice, question)
        num_asked += 1
    return num_asked


def register_until(server: Server, tiny_model: TinyModel, end_s: float, seed: int) -> int:
    """Puts one adapter after another in the place of ``guest``; each answers as itself."""
    chooser = random.Random(seed)
    num_registered = 0
    while time.monotonic() < end_s:
        voice = chooser.choice(list(tiny_model.adapters))
        path = str(tiny_model.adapters[voice])
        body = {"lora_name": "guest", "lora_path": path, "load_inplace": num_registered > 0}
        server.http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        question = chooser.randrange(len(tiny_model.prompts))
        answer = server.answer("guest", tiny_model.prompts[question])
        assert answer == tiny_model.answers[voice][question], (seed, voice, question)
        num_registered += 1
    return num_registered


def test_every_answer_is_right_while_adapters_come_and_go_and_loaders_die(
    tiny_model: TinyModel, seed: int
) -> None:
    with serving(*serve_arguments(tiny_model)) as server:
        end_s = time.monotonic() + SECONDS
        done = threading.Event()

        def kill_loaders() -> int:
            num_killed = 0
            while not done.wait(4.0):
                if "loader" in server.processes():
                    server.kill("loader")
                    num_killed += 1
            return num_killed

        with ThreadPoolExecutor(NUM_CLIENTS + 2) as pool:
            killer = pool.submit(kill_loaders)
            registering = pool.submit(register_until, server, tiny_model, end_s, seed)
            asking = [
                pool.submit(ask_until, server, tiny_model, end_s, seed + 1 + number)
                for number in range(NUM_CLIENTS)
            ]
            try:
                num_asked = sum(future.result() for future in asking)
                num_registered = registering.result()
            finally:
                done.set()
        assert killer.result() >= 5
        assert num_registered >= 10
        assert num_asked >= 500
        assert server.metric("sidestream:adapter_evictions_total") > 20
        assert server.metric("vllm:num_requests_running") == 0
        assert server.metric("sidestream:kv_blocks_used") == 0
