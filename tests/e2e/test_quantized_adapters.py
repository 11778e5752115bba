"""The tiny model's adapters, written in formats of eight bits, answer as they do."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from loader.peft_config import parse_config
from tests.e2e.conftest import DEVICE
from tests.e2e.harness import serving
from tests.loader.gguf_files import interleaved
from tests.loader.quantizers import FORMATS, Quantize, row_scaled
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

LINEARS = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def requantize(adapter: Path, folder: Path, encode: Quantize) -> Path:
    """The adapter in ``folder``, each tensor as ``encode`` writes it."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        for part, made in encode(tensor.float()).parts.items():
            tensors[name.removesuffix("weight") + part] = made.contiguous()
    save_file(tensors, path)
    return folder


def write_gguf(adapter: Path, path: Path, heads: dict[str, int]) -> Path:
    """The adapter as llama.cpp has it: eight bits where rows are long enough, else fp16.

    The file has one alpha for all, so scalings are in the B's.
    """
    config = parse_config((adapter / "adapter_config.json").read_bytes(), "config")
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        match = re.fullmatch(
            r"base_model\.model\.(model\.layers\.(\d+)\.\w+\.(\w+))\.(lora_[AB])\.weight", name
        )
        assert match is not None, name
        module, layer, linear, factor = match.groups()
        values = tensor.float().numpy()
        if factor == "lora_B":
            values = values * np.float32(config.scaling_of(module))
            if linear in heads:
                values = interleaved(values, heads[linear])
        kind = Type.Q8_0 if values.shape[1] % 32 == 0 else Type.F16
        writer.add_tensor(
            f"blk.{layer}.{LINEARS[linear]}.weight.{factor.lower()}",
            quantize(values, kind),
            raw_dtype=kind,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_adapters_of_eight_bits_answer_like_the_ones_they_were_made_of(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    geometry = json.loads((tiny_model.base / "config.json").read_text())
    heads = {
        "q_proj": geometry["num_attention_heads"],
        "k_proj": geometry["num_key_value_heads"],
    }
    formats = {
        "fp8": row_scaled("fp8"),
        "int8": row_scaled("int8"),
        "bitsandbytes": FORMATS["bitsandbytes int8"],
    }
    arguments = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32", "--port", "0"]
    arguments += ["--served-model-name", "tiny", "--kv-cache-memory", "64MiB"]
    in_folder = tmp_path / "in-folder"
    in_folder.mkdir()
    arguments += ["--lora-dir", str(in_folder)]
    asked = []
    for format, voice in product((*formats, "gguf"), tiny_model.adapters):
        name, folder = f"{voice}-{format}", tiny_model.adapters[voice]
        if format == "gguf":
            write_gguf(folder, in_folder / f"{name}.gguf", heads)
        else:
            path = requantize(folder, tmp_path / name, formats[format])
            arguments += ["--lora", f"{name}={path}"]
        for prompt, answer in zip(tiny_model.prompts, tiny_model.answers[voice], strict=True):
            asked.append((name, prompt, answer))
    with serving(*arguments) as server, ThreadPoolExecutor(16) as pool:
        given = list(pool.map(lambda one: server.answer(one[0], one[1]), asked))
    wrong = [(one, answer) for one, answer in zip(asked, given, strict=True) if one[2] != answer]
    assert not wrong, f"{len(wrong)} of {len(asked)} wrong, first {wrong[0]}"
