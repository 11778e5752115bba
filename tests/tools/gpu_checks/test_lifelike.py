"""What the accuracy check computes with, and what it compares with."""

import pytest
import torch

from engine.config import DeviceKind
from ipc.image import EntryKind
from tools.gpu_checks.lifelike import (
    DELTA,
    LOGIT_DEVIATION,
    adapter_matrices,
    fill_adapter,
    scale_head,
)
from tools.gpu_checks.live_engine import LiveEngine
from tools.gpu_checks.reference import Reference
from tools.gpu_checks.setting import Setting

SCALING = 2.0


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    work = tmp_path_factory.mktemp("work")
    return Setting(DeviceKind.CPU, True, work, work, 60.0)


@pytest.fixture(scope="module")
def engine(setting: Setting) -> LiveEngine:
    return LiveEngine(setting.engine_config(setting.shape("toy")))


@pytest.mark.parametrize("rank", [8, 64])
def test_an_adapters_delta_is_a_fixed_part_of_the_base_output(
    rank: int, engine: LiveEngine
) -> None:
    (adapter_id,) = engine.add_adapters(rank, 1, SCALING)
    engine.ensure_resident([adapter_id])
    fill_adapter(engine, adapter_id, SCALING)
    weights = engine.compute.decoder.checkpoint_tensors()
    pairs: dict[str, dict[EntryKind, torch.Tensor]] = {}
    for prefix, kind, matrix in adapter_matrices(engine, adapter_id):
        pairs.setdefault(prefix, {})[kind] = matrix.float()
    assert len(pairs) == 7 * engine.compute.base.num_layers
    # Not the seed that the weights were drawn with.
    torch.manual_seed(1234)
    for prefix, pair in pairs.items():
        weight = weights[f"{prefix}.weight"].float()
        x = torch.randn(256, weight.shape[1])
        delta = SCALING * x @ pair[EntryKind.LORA_A].T @ pair[EntryKind.LORA_B].T
        ratio = delta.square().mean().sqrt() / (x @ weight.T).square().mean().sqrt()
        assert ratio == pytest.approx(DELTA, rel=0.2), prefix


def test_logits_of_normed_states_have_the_deviation_that_is_wanted(engine: LiveEngine) -> None:
    scale_head(engine)
    hidden = torch.randn(64, engine.compute.model.hidden_size).bfloat16()
    assert engine.compute.decoder.logits(hidden).float().std() == pytest.approx(
        LOGIT_DEVIATION, rel=0.05
    )


@pytest.mark.slow
def test_the_reference_keeps_the_rotary_frequencies_in_float32(
    setting: Setting, engine: LiveEngine
) -> None:
    (adapter_id,) = engine.add_adapters(8, 1, SCALING)
    engine.ensure_resident([adapter_id])
    reference = Reference(engine, setting.shape("toy"), {adapter_id: 8}, SCALING, torch.bfloat16)
    dtypes = reference.dtypes()
    assert {dtype for name, dtype in dtypes.items() if "inv_freq" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "weight" in name} == {torch.bfloat16}
