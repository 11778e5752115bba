"""The tiny model's adapters, written in formats of eight bits, answer as they do."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.e2e.conftest import DEVICE
from tests.e2e.harness import serving
from tests.loader.test_quantized import FORMATS, Quantize, row_scaled
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


def requantize(adapter: Path, folder: Path, quantize: Quantize) -> Path:
    """The adapter in ``folder``, each tensor as ``quantize`` writes it."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        for part, made in quantize(tensor.float()).parts.items():
            tensors[name.removesuffix("weight") + part] = made.contiguous()
    save_file(tensors, path)
    return folder


def test_adapters_of_eight_bits_answer_like_the_ones_they_were_made_of(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    formats = {
        "fp8": row_scaled("fp8"),
        "int8": row_scaled("int8"),
        "bitsandbytes": FORMATS["bitsandbytes int8"],
    }
    arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
    arguments += ["--served-model-name", "tiny", "--kv-cache-memory", "64MiB"]
    asked = []
    for format, quantize in formats.items():
        for voice, folder in tiny_model.adapters.items():
            name = f"{voice}-{format}"
            arguments += ["--lora", f"{name}={requantize(folder, tmp_path / name, quantize)}"]
            for prompt, answer in zip(tiny_model.prompts, tiny_model.answers[voice], strict=True):
                asked.append((name, prompt, answer))
    with serving(*arguments) as server, ThreadPoolExecutor(16) as pool:
        given = list(pool.map(lambda one: server.answer(one[0], one[1]), asked))
    wrong = [(one, answer) for one, answer in zip(asked, given, strict=True) if one[2] != answer]
    assert not wrong, f"{len(wrong)} of {len(asked)} wrong, first {wrong[0]}"
