"""Bad input gets an answer that says what is wrong, and costs nobody else anything."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import DEVICE
from tests.e2e.harness import Server, serving
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The only folder that adapters may come from."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def server(tiny_model: TinyModel, root: Path) -> Iterator[Server]:
    """A server whose adapters all come through its API."""
    arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
    arguments += ["--served-model-name", "tiny", "--max-lora-rank", "32"]
    with serving(*arguments, "--adapter-root", str(root)) as shared:
        yield shared


@pytest.fixture
def adapter(tiny_model: TinyModel, root: Path) -> Path:
    """A good adapter, for the test to spoil."""
    folder = root / f"adapter-{len(list(root.iterdir()))}"
    shutil.copytree(tiny_model.adapters["shout"], folder)
    return folder


def load(server: Server, name: str, path: Path) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path)}
    return server.http.post("/v1/load_lora_adapter", json=body)


def message(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    text = error["message"]
    assert isinstance(text, str)
    return text


def edit_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_unknown_model_is_404(server: Server) -> None:
    response = server.complete("nobody", "x")
    assert "nobody" in message(response, 404)
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_prompt_that_is_too_long_says_how_long_it_may_be(server: Server) -> None:
    text = message(server.complete("tiny", "x" * 100_000), 400)
    assert "100000" in text or "100001" in text


def test_malformed_json_is_400(server: Server) -> None:
    headers = {"content-type": "application/json"}
    response = server.http.post("/v1/completions", content=b'{"model": ', headers=headers)
    assert "JSON" in message(response, 400)


def test_a_field_of_the_wrong_type_is_named(server: Server) -> None:
    text = message(server.complete("tiny", "x", temperature="warm"), 400)
    assert "temperature" in text and "str" in text


def test_a_field_out_of_its_range_is_named(server: Server) -> None:
    response = server.complete("tiny", "x", top_p=2)
    assert "top_p: expected `float` <= 1.0, got 2" in message(response, 400)
    assert response.json()["error"]["param"] == "top_p"


def test_a_truncated_adapter_is_refused(server: Server, adapter: Path) -> None:
    tensors = adapter / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert "adapter_model.safetensors" in message(load(server, "cut", adapter), 422)


def test_a_corrupt_header_is_refused(server: Server, adapter: Path) -> None:
    tensors = adapter / "adapter_model.safetensors"
    tensors.write_bytes(b"\xff" * 8 + tensors.read_bytes()[8:])
    assert "header" in message(load(server, "corrupt", adapter), 422)


def test_a_rank_above_the_limit_names_module_rank_and_limit(server: Server, adapter: Path) -> None:
    edit_config(adapter, r=96)
    text = message(load(server, "wide", adapter), 422)
    assert "96" in text and "r" in text


def test_a_missing_configuration_is_named(server: Server, adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json" in message(load(server, "bare", adapter), 422)


def test_a_pickled_adapter_is_refused_by_name(server: Server, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin" in message(load(server, "pickled", adapter), 422)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_qalora", True), ("bias", "some"), ("modules_to_save", ["lm_head"]), ("lora_bias", True)],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(
    server: Server, adapter: Path, field: str, value: object
) -> None:
    edit_config(adapter, **{field: value})
    assert field in message(load(server, "unserved", adapter), 422)


def test_a_path_outside_the_roots_is_refused(server: Server, tiny_model: TinyModel) -> None:
    response = load(server, "outside", tiny_model.adapters["shout"])
    assert 400 <= response.status_code < 500
    assert str(tiny_model.adapters["shout"]) in response.json()["error"]["message"]


def test_a_link_that_leads_out_of_the_roots_is_refused(
    server: Server, tiny_model: TinyModel, root: Path
) -> None:
    link = root / "link"
    link.symlink_to(tiny_model.adapters["shout"])
    assert 400 <= load(server, "linked", link).status_code < 500


def test_a_name_that_is_taken_is_refused_and_stays_served(
    server: Server, adapter: Path, tiny_model: TinyModel
) -> None:
    assert load(server, "taken", adapter).status_code == 200
    assert "taken" in message(load(server, "taken", adapter), 400)
    assert server.answer("taken", tiny_model.prompts[0]) == tiny_model.answers["shout"][0]
    unload = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "taken"})
    assert unload.status_code == 200
    assert server.complete("taken", "x").status_code == 404


def test_unloading_an_unknown_name_is_404(server: Server) -> None:
    response = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"})
    assert "nobody" in message(response, 404)


def test_a_file_rewritten_after_registration_fails_its_requests_and_nobody_elses(
    server: Server, adapter: Path, tiny_model: TinyModel
) -> None:
    assert load(server, "rewritten", adapter).status_code == 200
    tensors = adapter / "adapter_model.safetensors"
    other = tiny_model.adapters["shout"] / "adapter_model.safetensors"
    tensors.write_bytes(other.read_bytes())
    text = message(server.complete("rewritten", tiny_model.prompts[0]), 422)
    assert str(adapter) in text and "changed" in text
    assert server.answer("tiny", tiny_model.prompts[0]) == tiny_model.answers[None][0]
    unload = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "rewritten"})
    assert unload.status_code == 200
    assert load(server, "rewritten", adapter).status_code == 200
    assert server.answer("rewritten", tiny_model.prompts[0]) == tiny_model.answers["shout"][0]


def test_an_adapter_that_is_put_in_anothers_place_answers_from_then_on(
    server: Server, adapter: Path, tiny_model: TinyModel, root: Path
) -> None:
    prompt = tiny_model.prompts[5]
    assert load(server, "moving", adapter).status_code == 200
    assert server.answer("moving", prompt) == tiny_model.answers["shout"][5]
    other = root / "moving-reverse"
    shutil.copytree(tiny_model.adapters["reverse"], other)
    body = {"lora_name": "moving", "lora_path": str(other), "load_inplace": True}
    server.http.post("/v1/load_lora_adapter", json=body).raise_for_status()
    assert server.answer("moving", prompt) == tiny_model.answers["reverse"][5]


def test_a_replacement_that_is_refused_leaves_the_old_adapter_serving(
    server: Server, adapter: Path, tiny_model: TinyModel, root: Path
) -> None:
    prompt = tiny_model.prompts[6]
    assert load(server, "staying", adapter).status_code == 200
    broken = root / "broken-replacement"
    shutil.copytree(tiny_model.adapters["reverse"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors at all")
    body = {"lora_name": "staying", "lora_path": str(broken), "load_inplace": True}
    refused = server.http.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == 422 and "its header claims" in refused.text, refused.text
    assert server.answer("staying", prompt) == tiny_model.answers["shout"][6]


def test_token_ids_of_a_prompt_must_be_in_the_vocabulary(server: Server) -> None:
    body = {"model": "tiny", "prompt": [1, 2, 10_000_000], "max_tokens": 4}
    text = message(server.http.post("/v1/completions", json=body), 400)
    assert "10000000" in text and "position 2" in text
