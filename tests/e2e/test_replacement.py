"""An adapter that is put in another's place serves whoever asks from then on, and nobody else."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import DEVICE
from tests.e2e.harness import DEADLINE_S, Server, serving, wait_until
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

NUM_TOKENS = 400


def endless(server: Server, model: str, prompt: str) -> str:
    """An answer that goes on long behind its end."""
    fields = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answered = server.complete(model, prompt, **fields)
    answered.raise_for_status()
    text: str = answered.json()["choices"][0]["text"]
    return text


def test_who_runs_ends_with_the_old_one_and_who_comes_begins_with_the_new(
    tiny_model: TinyModel,
) -> None:
    arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
    arguments += ["--served-model-name", "tiny", "--kv-cache-memory", "64MiB"]
    for name, path in (tiny_model.adapters | {"guest": tiny_model.adapters["shout"]}).items():
        arguments += ["--lora", f"{name}={path}"]
    prompt = tiny_model.long_prompts[0]
    with serving(*arguments) as server, ThreadPoolExecutor(1) as pool:
        expected = endless(server, "shout", prompt)
        # Its prefix is cached, and the new one's requests begin with the same tokens.
        assert server.answer("guest", prompt) == tiny_model.answers["shout"][0]
        running = pool.submit(endless, server, "guest", prompt)
        wait_until(lambda: server.metric("vllm:num_requests_running") == 1, "the old one runs")
        body = {
            "lora_name": "guest",
            "lora_path": str(tiny_model.adapters["pirate"]),
            "load_inplace": True,
        }
        server.http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        for number, asked in enumerate(tiny_model.long_prompts[:4]):
            assert server.answer("guest", asked) == tiny_model.answers["pirate"][number]
        assert not running.done(), "it was over before: nothing was tested"
        assert running.result(DEADLINE_S) == expected
        assert server.answer("guest", prompt) == tiny_model.answers["pirate"][0]
        wait_until(lambda: server.metric("sidestream:kv_blocks_used") == 0, "all blocks are back")
