"""What a client does to its own requests: going away, asking in token ids, asking for many."""

import shutil
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import DEVICE
from tests.e2e.harness import Server, serving, wait_until
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


def is_idle(server: Server) -> bool:
    running = server.metric("vllm:num_requests_running")
    waiting = server.metric("vllm:num_requests_waiting")
    return running == waiting == server.metric("sidestream:kv_blocks_used") == 0


def test_a_client_that_goes_away_frees_its_blocks(server: Server) -> None:
    body = {"model": "tiny", "prompt": "x", "stream": True, "max_tokens": 4000, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert not is_idle(server)
    wait_until(lambda: is_idle(server), "the engine is idle", 10)


def test_a_client_that_gives_up_a_whole_answer_frees_its_blocks(server: Server) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "ignore_eos": True, "n": 4}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/completions", json=body, timeout=0.05)
    wait_until(lambda: is_idle(server), "the engine is idle", 10)


def test_a_model_without_a_tokenizer_serves_token_ids(
    tiny_model: TinyModel, tmp_path: Path, server: Server
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        if (tiny_model.base / name).exists():
            shutil.copy(tiny_model.base / name, folder / name)
    tokenized = server.complete("tiny", tiny_model.prompts[0], return_token_ids=True).json()
    choice = tokenized["choices"][0]
    with serving(str(folder), "--device", DEVICE, "--dtype", "float32", "--port", "0") as bare:
        body = {"model": "bare", "prompt": choice["prompt_token_ids"], "temperature": 0,
                "max_tokens": 64, "return_token_ids": True}  # fmt: skip
        answer = bare.http.post("/v1/completions", json=body).raise_for_status().json()
        assert answer["choices"][0]["token_ids"] == choice["token_ids"]
        refused = bare.complete("bare", "text")
        assert refused.status_code == 400
        assert "tokenizer" in refused.json()["error"]["message"]
