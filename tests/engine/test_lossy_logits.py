"""Adapters in every lossy format give the logits that PEFT gives with the values they stand for.

The values are those that the format's own writer, or the package gguf, makes of the file. Rows are
256 wide, A's and B's: the least that all types of GGUF have whole blocks of.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch import Tensor

from engine.config import DeviceKind
from engine.device import open_device
from engine.models.config import read_model_config
from ipc.base_model import LINEAR_MODULES, BaseModel, DType
from ipc.messages import AdapterId
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.engine.rig import Rig
from tests.engine.test_peft_logits import CLEARLY, NAME, TOLERANCE, image_of
from tests.engine.tiny_checkpoints import VOCAB_SIZE, Oracle
from tests.loader.gguf_files import MADE_UP, WRITTEN, Written, random_blocks
from tests.loader.images import HOST_TIER_BYTES, read_image
from tests.loader.quantizers import FORMATS, quantized_tensors, write

WIDTH = 256
OF_GGUF = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
LOSSLESS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Served:
    """A base model of one layer, and PEFT's view of it with an adapter on every linear."""

    folder: Path
    base: BaseModel
    oracle: Oracle

    def assert_same_logits(self, path: Path, factors: Mapping[str, Tensor], scaling: float) -> None:
        """The adapter at ``path`` stands for ``factors``."""
        rig = Rig(self.folder, open_device(DeviceKind.CPU))
        folders = AdapterFolders([str(path.parent)], None)
        inspector = Inspector(folders, rig.base, WIDTH, HOST_TIER_BYTES)
        manifest = inspector.inspect(AdapterId(1), str(path))
        assert {module.scaling for module in manifest.modules} == {scaling}
        image = image_of(rig.base, manifest, read_image(inspector, manifest))
        adapter_id = rig.install(1, image)
        source = random.Random(path.name)
        token_ids = [source.randrange(VOCAB_SIZE) for _ in range(23)]
        sequence = rig.sequence(token_ids, adapter_id)
        (prefilled,) = rig.advance((sequence, 20))
        decoded = [rig.advance((sequence, 1))[0] for _ in range(3)]
        self.oracle.set_pairs(NAME, factors, scaling)
        expected = self.oracle.logits(NAME, token_ids)
        assert (torch.cat([prefilled, *decoded]) - expected).abs().max() < TOLERANCE
        (of_base,) = rig.advance((rig.sequence(token_ids), len(token_ids)))
        assert (of_base - expected).abs().max() > CLEARLY


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("base")
    adapters = {NAME: {"r": WIDTH, "target_modules": list(LINEAR_MODULES)}}
    oracle = Oracle(
        "llama",
        folder,
        adapters,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
    )
    return Served(folder, read_model_config(folder).base_model(DType.FLOAT32), oracle)


def alpha_of(spread: float) -> float:
    """For values of this standard deviation: what they add is a part of what is there."""
    return math.ldexp(1, round(-2 * math.log2(spread) - 2))


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in LOSSLESS])
def test_a_quantized_folder_gives_pefts_logits(served: Served, format: str, tmp_path: Path) -> None:
    stored, factors = quantized_tensors(served.base, FORMATS[format], WIDTH, LINEAR_MODULES)
    alpha = alpha_of(float(next(iter(factors.values())).std()))
    path = write(tmp_path / "adapter", stored, LINEAR_MODULES, WIDTH, lora_alpha=alpha)
    served.assert_same_logits(path, factors, alpha / WIDTH)


@pytest.mark.parametrize("kind", (*WRITTEN, *MADE_UP), ids=lambda kind: kind.name)
def test_a_gguf_file_gives_pefts_logits(served: Served, kind: Type, tmp_path: Path) -> None:
    spread = 1.0
    if kind in MADE_UP:
        blocks = random_blocks(kind, 16, WIDTH, np.random.default_rng(0))
        spread = float(dequantize(blocks, kind).std())
    alpha = alpha_of(spread)
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf" / "adapter.gguf"
    written = Written(path, served.base, lambda: kind, names=OF_GGUF, alpha=alpha)
    factors = {name: tensor.values() for name, tensor in written.plain.items()}
    served.assert_same_logits(path, factors, alpha / WIDTH)
