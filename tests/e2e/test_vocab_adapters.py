"""Adapters of embedding and head answer as PEFT does, next to plain ones and in another's place."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.e2e.conftest import DEVICE
from tests.e2e.harness import serving
from tests.e2e.peft_answers import NUM_TOKENS, answers_of_peft
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

PREFIX = "base_model.model."


def write_with(
    source: Path, folder: Path, tensors: Mapping[str, Tensor], fields: dict[str, Any]
) -> Path:
    """The adapter in ``source`` with more tensors; lists of its configuration grow."""
    shutil.copytree(source, folder)
    own = load_file(folder / "adapter_model.safetensors")
    save_file(own | dict(tensors), folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, values in fields.items():
        config[name] = [*(config[name] or ()), *values]
    path.write_text(json.dumps(config))
    return folder


def write_pairs(tiny_model: TinyModel, voice: str, folder: Path, seed: int) -> Path:
    """Pairs of both, beside copies of the base's table as PEFT writes them."""
    table = load_file(tiny_model.base / "model.safetensors")["model.embed_tokens.weight"]
    vocab, hidden = table.shape
    rank = json.loads((tiny_model.adapters[voice] / "adapter_config.json").read_text())["r"]
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    embed, head = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"
    tensors = {
        f"{embed}.lora_embedding_A": values(rank, vocab),
        f"{embed}.lora_embedding_B": values(hidden, rank),
        f"{embed}.base_layer.weight": table.clone(),
        f"{head}.lora_A.weight": values(rank, hidden),
        f"{head}.lora_B.weight": values(vocab, rank),
        f"{head}.base_layer.weight": table.clone(),
    }
    fields = {"target_modules": ["embed_tokens", "lm_head"]}
    return write_with(tiny_model.adapters[voice], folder, tensors, fields)


def write_whole(tiny_model: TinyModel, voice: str, folder: Path, seed: int) -> Path:
    """Whole tables of both, which differ from the base's and from each other."""
    table = load_file(tiny_model.base / "model.safetensors")["model.embed_tokens.weight"].float()
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{PREFIX}{path}.weight": table
        + torch.randn(table.shape, generator=generator) * 0.3 * table.std()
        for path in ("model.embed_tokens", "lm_head")
    }
    fields = {"modules_to_save": ["embed_tokens", "lm_head"]}
    return write_with(tiny_model.adapters[voice], folder, tensors, fields)


# What PEFT says of layers that the base ties to each other.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("mode", ["overlap", "layerwise"])
def test_adapters_of_embedding_and_head_answer_as_in_peft(
    tiny_model: TinyModel, tmp_path: Path, mode: str
) -> None:
    folders = {
        "pairs": write_pairs(tiny_model, "shout", tmp_path / "pairs", seed=1),
        "whole": write_whole(tiny_model, "json", tmp_path / "whole", seed=2),
        "plain": tiny_model.adapters["pirate"],
    }
    other = write_pairs(tiny_model, "json", tmp_path / "other", seed=3)
    expected = {name: answers_of_peft(tiny_model, folder) for name, folder in folders.items()}
    assert expected["pairs"] != [each[:NUM_TOKENS] for each in tiny_model.answers["shout"][:4]]
    assert expected["whole"] != [each[:NUM_TOKENS] for each in tiny_model.answers["json"][:4]]
    arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
    arguments += ["--served-model-name", "tiny", "--kv-cache-memory", "64MiB"]
    arguments += ["--adapter-loading", mode, "--adapter-root", str(tmp_path)]
    for name, folder in folders.items():
        arguments += ["--lora", f"{name}={folder}"]
    prompts = tiny_model.prompts[:4]
    with serving(*arguments) as server, ThreadPoolExecutor(16) as pool:

        def ask(pair: tuple[str, str]) -> str:
            return server.answer(*pair, max_tokens=NUM_TOKENS)

        # All at once: so that rows of each stand in one batch.
        asked = [(name, prompt) for prompt in prompts for name in (*folders, "tiny")]
        answers = dict(zip(asked, pool.map(ask, asked), strict=True))
        for name in folders:
            assert [answers[name, prompt] for prompt in prompts] == expected[name], name
        of_base = [server.answer("tiny", prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
        assert [answers["tiny", prompt] for prompt in prompts] == of_base
        body = {"lora_name": "pairs", "lora_path": str(other), "load_inplace": True}
        server.http.post("/v1/load_lora_adapter", json=body).raise_for_status()
        replaced = [ask(("pairs", prompt)) for prompt in prompts]
        assert replaced == answers_of_peft(tiny_model, other) != expected["pairs"]
