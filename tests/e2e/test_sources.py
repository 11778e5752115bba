"""A server takes adapters from other machines, at its start and while it runs."""

from pathlib import Path

import pytest

from tests.e2e.conftest import DEVICE
from tests.e2e.harness import serving
from tests.loader.remote.file_server import file_server
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


def test_adapters_of_a_web_server_answer_as_those_of_the_disk(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    with file_server() as files:
        for name in ("shout", "json"):
            for file in Path(tiny_model.adapters[name]).iterdir():
                files.files[f"/team/{name}/{file.name}"] = file.read_bytes()
        arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
        arguments += ["--served-model-name", "tiny", "--kv-cache-memory", "64MiB"]
        arguments += ["--adapter-cache-dir", str(tmp_path / "cache")]
        arguments += ["--lora", f"shout={files.url}/team/shout"]
        with serving(*arguments, "--adapter-source", f"{files.url}/team") as server:

            def right(model: str) -> bool:
                asked = tiny_model.prompts[:4]
                answers = [server.answer(model, prompt) for prompt in asked]
                return answers == list(tiny_model.answers[model][:4])

            assert right("shout")
            body = {"lora_name": "json", "lora_path": f"{files.url}/team/json"}
            server.http.post("/v1/load_lora_adapter", json=body).raise_for_status()
            assert right("json")
            body = {"lora_name": "other", "lora_path": f"{files.url}/others/x"}
            refused = server.http.post("/v1/load_lora_adapter", json=body)
            assert refused.status_code == 400
            assert "--adapter-source" in refused.json()["error"]["message"]
            server.kill("loader")
            assert right("shout") and right("json")
        tensors = "/team/shout/adapter_model.safetensors"
        assert len(files.gets(tensors)) == 1
        with serving(*arguments) as server:
            assert right("shout")
        assert len(files.gets(tensors)) == 1
