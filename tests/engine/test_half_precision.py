"""The same forward pass in the dtypes that models are served in on a GPU."""

from pathlib import Path

import pytest
import torch

from engine.device import CpuDevice, torch_dtype
from ipc.base_model import DType
from tests.engine.lora_images import image_of_peft
from tests.engine.rig import Rig
from tests.engine.tiny_checkpoints import ADAPTERS, FAMILIES, Oracle


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
def test_logits_in_half_precision_stay_near_those_in_float32(
    tmp_path: Path, family: str, dtype: DType
) -> None:
    oracle = Oracle(family, tmp_path)
    rig = Rig(tmp_path, CpuDevice(), dtype)
    token_ids = list(range(3, 20))
    names: list[str | None] = [None, *ADAPTERS]
    sequences = [rig.sequence(token_ids)]
    for number, adapter in enumerate(ADAPTERS):
        adapter_id = rig.install(number, image_of_peft(rig.base, oracle.layers, adapter))
        sequences.append(rig.sequence(token_ids, adapter_id))
    first = rig.advance(*((each, 9) for each in sequences))
    second = rig.advance(*((each, 8) for each in sequences))
    for name, head, tail in zip(names, first, second, strict=True):
        error = (torch.cat((head, tail)) - oracle.logits(name, token_ids)).abs().mean()
        # Logits are of order 1; two layers round some dozen times.
        assert error < 10 * torch.finfo(torch_dtype(dtype)).eps, name
