"""Adapters that were hinted at come in without a request."""

import re
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import DEVICE, serve_arguments
from tests.e2e.harness import Server, serving, wait_until
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


def prefetch(server: Server, *names: str) -> httpx.Response:
    return server.http.post("/v1/prefetch_lora_adapters", json={"lora_names": list(names)})


def levels(server: Server) -> dict[str, str]:
    """Where the adapters lie that are anywhere but on disk."""
    text = server.http.get("/metrics").raise_for_status().text
    samples = re.findall(r"^vllm:lora_adapter_loaded\{(.*)\} 1\.0$", text, re.MULTILINE)
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', sample)) for sample in samples]
    return {of_one["adapter_name"]: of_one["level"] for of_one in labels}


def test_hinted_adapters_fill_the_pool_and_then_the_host_tier(tiny_model: TinyModel) -> None:
    names = list(tiny_model.adapters)
    with serving(*serve_arguments(tiny_model)) as server:
        assert levels(server) == {}
        answer = prefetch(server, *names)
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        assert [adapter["lora_name"] for adapter in data] == names
        assert {adapter["residency"] for adapter in data} == {"disk"}
        # Two of them fit into the pool.
        expected = dict(zip(names, ("gpu", "gpu", "host", "host"), strict=True))
        wait_until(lambda: levels(server) == expected, f"the adapters lie as {expected}")
        assert server.metric("sidestream:adapter_evictions_total") == 0
        for name in names:
            answered = server.answer(name, tiny_model.prompts[0])
            assert answered == tiny_model.answers[name][0]


def test_unknown_names_are_all_named_and_nothing_is_prefetched(tiny_model: TinyModel) -> None:
    with serving(*serve_arguments(tiny_model)) as server:
        refused = prefetch(server, "shout", "nobody", "nothing")
        assert refused.status_code == 404, refused.text
        message = refused.json()["error"]["message"]
        assert "'nobody', 'nothing'" in message and "shout" not in message
        assert server.answer("json", tiny_model.prompts[0]) == tiny_model.answers["json"][0]
        assert set(levels(server)) == {"json"}


def test_too_many_names_are_refused(server: Server) -> None:
    refused = prefetch(server, *(str(number) for number in range(65)))
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "lora_names"


def test_adapters_of_a_folder_can_be_hinted_at(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "tenant").symlink_to(tiny_model.adapters["shout"])
    roots = ("--adapter-root", str(tiny_model.adapters["shout"].parent))
    arguments = [str(tiny_model.base), "--device", DEVICE, "--port", "0"]
    with serving(*arguments, "--lora-dir", str(tmp_path), *roots) as server:
        refused = prefetch(server, "tenant", "nobody")
        assert refused.status_code == 404, refused.text
        assert "'nobody'" in refused.json()["error"]["message"]
        assert prefetch(server, "tenant").json()["data"] == [
            {"lora_name": "tenant", "residency": "disk"}
        ]
        wait_until(lambda: levels(server) == {"tenant": "gpu"}, "the adapter is in the pool")
