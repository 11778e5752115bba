"""Random weights from a configuration alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.compute import build_compute
from engine.config import DeviceKind, EngineConfig, LoadFormat, ModelDType
from engine.device import CpuDevice
from engine.models.config import read_model_config
from engine.models.dummy import make_dummy_model
from engine.plan import ScheduledChunk, StepPlan
from engine.sequence import Sequence
from ipc.base_model import DType
from tests.engine.rig import make_sequence

FIELDS = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds nothing but a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


def weights(folder: Path, seed: int) -> dict[str, Tensor]:
    config = read_model_config(folder)
    return make_dummy_model(config, DType.BFLOAT16, CpuDevice(), seed).checkpoint_tensors()


def test_equal_seeds_give_equal_weights_and_others_do_not(folder: Path) -> None:
    first, again, other = weights(folder, 3), weights(folder, 3), weights(folder, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[name], other[name])


def test_norms_are_one_and_every_other_weight_is_random(folder: Path) -> None:
    for name, tensor in weights(folder, 0).items():
        if "norm" in name:
            assert tensor.eq(1).all(), name
        else:
            assert 0.015 < tensor.float().std().item() < 0.025, name


def test_a_deep_bfloat16_model_stays_finite_without_any_file_but_its_config(
    folder: Path,
) -> None:
    config = EngineConfig(
        model=str(folder),
        served_model_name="dummy",
        device=DeviceKind.CPU,
        dtype=ModelDType.BFLOAT16,
        load_format=LoadFormat.DUMMY,
        kv_cache_bytes=1 << 20,
        max_adapter_bytes=1 << 10,
    )
    compute = build_compute(config, CpuDevice())
    sequence: Sequence = make_sequence(list(range(40)))
    sequence.block_table = [0, 1, 2]
    logits = compute.runner.run_for_logits(StepPlan((ScheduledChunk(sequence, 0, 40, True),)))
    assert logits.dtype is torch.bfloat16
    assert logits.isfinite().all()
