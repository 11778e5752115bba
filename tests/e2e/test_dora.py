"""DoRA adapters answer as PEFT does, also in another's place and out of what was kept on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader.peft_config import parse_config
from tests.e2e.conftest import DEVICE
from tests.e2e.harness import serving
from tests.e2e.peft_answers import NUM_TOKENS, answers_of_peft
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

COMPUTED = "its row scales took"


def write_dora(tiny_model: TinyModel, voice: str, folder: Path, seed: int) -> Path:
    """The adapter with magnitudes around the norms of its weights."""
    shutil.copytree(tiny_model.adapters[voice], folder)
    weights = load_file(tiny_model.base / "model.safetensors")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = parse_config((folder / "adapter_config.json").read_bytes(), "config")
    generator = torch.Generator().manual_seed(seed)
    magnitudes = {}
    for name in tensors:
        prefix, found, _ = name.partition(".lora_A.weight")
        if not found:
            continue
        path = prefix.removeprefix("base_model.model.")
        a, b = (tensors[f"{prefix}.{factor}.weight"].float() for factor in ("lora_A", "lora_B"))
        norms = (weights[f"{path}.weight"].float() + config.scaling_of(path) * b @ a).norm(dim=1)
        factors = 0.6 + 0.8 * torch.rand(norms.shape, generator=generator)
        magnitudes[f"{prefix}.lora_magnitude_vector"] = norms * factors
    save_file(tensors | magnitudes, folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"use_dora": True}))
    return folder


def test_dora_adapters_answer_as_in_peft(tiny_model: TinyModel, tmp_path: Path) -> None:
    first = write_dora(tiny_model, "shout", tmp_path / "first", seed=1)
    second = write_dora(tiny_model, "json", tmp_path / "second", seed=2)
    expected = {folder: answers_of_peft(tiny_model, folder) for folder in (first, second)}
    assert expected[first] != list(tiny_model.answers["shout"][:4])
    arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
    arguments += ["--served-model-name", "tiny", "--kv-cache-memory", "64MiB"]
    arguments += ["--row-scale-cache", str(tmp_path / "rows"), "--adapter-root", str(tmp_path)]
    arguments += ["--lora", f"dora={first}", "--lora", f"plain={tiny_model.adapters['shout']}"]
    asked = tiny_model.prompts[:4]
    with serving(*arguments) as server:

        def answers(model: str) -> list[str]:
            return [server.answer(model, prompt, max_tokens=NUM_TOKENS) for prompt in asked]

        # Its own threads step back for the engine's; those of a library would not.
        assert server.processes()["loader"].environ()["OPENBLAS_NUM_THREADS"] == "1"
        assert answers("dora") == expected[first]
        assert answers("plain") == [
            answer[:NUM_TOKENS] for answer in tiny_model.answers["shout"][:4]
        ]
        body = {"lora_name": "dora", "lora_path": str(second), "load_inplace": True}
        server.http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        assert answers("dora") == expected[second]
        assert server.log.count(COMPUTED) == 2
    with serving(*arguments) as server:
        assert answers("dora") == expected[first]
        assert COMPUTED not in server.log
