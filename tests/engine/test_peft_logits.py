"""Files that PEFT writes, read by the loader, give the logits that PEFT gives, field by field."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import DeviceKind
from engine.device import open_device
from ipc.base_model import BaseModel
from ipc.image import EntryKind, layout_image
from ipc.messages import AdapterId, Manifest
from tests.adapters import make_old
from tests.engine.lora_images import LoraImage, make_image
from tests.engine.rig import Rig
from tests.engine.tiny_checkpoints import VOCAB_SIZE, Oracle
from tests.loader.dora import deriver_of
from tests.loader.images import read_open, source_of

TOLERANCE = 1e-4
CLEARLY = 0.05
NAME = "adapter"

FIELDS: dict[str, dict[str, Any]] = {
    "r and lora_alpha": {"r": 5, "lora_alpha": 7},
    "use_rslora": {"use_rslora": True, "r": 4, "lora_alpha": 6},
    "rank_pattern": {"r": 8, "rank_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {r"^model\.layers\.0\.mlp\..*": 24, "v_proj": 2}},
    "both patterns and use_rslora": {
        "rank_pattern": {"o_proj": 2, "1.mlp.up_proj": 12},
        "alpha_pattern": {"[ou]p?_proj": 3},
        "use_rslora": True,
    },
    "target_modules, a list": {
        "target_modules": ["q_proj", "mlp.down_proj", "layers.1.mlp.up_proj"]
    },
    "target_modules, a pattern": {"target_modules": r".*\.(self_attn\.[qv]|mlp\.(up|down))_proj"},
    "exclude_modules, a list": {"exclude_modules": ["k_proj", "0.mlp.up_proj"]},
    "exclude_modules, a pattern": {"exclude_modules": r"model\.layers\.0\..*"},
    "layers_to_transform, a number": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers_to_transform, a list": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["h", "layers"],
    },
    "bias": {"bias": "all"},
    "bias, of other modules": {"bias": "all", "target_modules": ["k_proj", "down_proj"]},
    "bias, of targeted modules": {"bias": "lora_only", "target_modules": ["k_proj", "down_proj"]},
    "use_dora": {"use_dora": True},
    "use_dora and use_rslora": {"use_dora": True, "use_rslora": True, "r": 5, "lora_alpha": 6},
    "use_dora and both patterns": {
        "use_dora": True,
        "rank_pattern": {"o_proj": 2, "1.mlp.up_proj": 12},
        "alpha_pattern": {"[ou]p?_proj": 3},
    },
    "use_dora of some modules": {
        "use_dora": True,
        "target_modules": r".*\.1\.(self_attn\.[kv]|mlp\.up)_proj",
    },
    "use_dora and bias": {"use_dora": True, "bias": "lora_only"},
    "use_dora and bias of other modules": {
        "use_dora": True,
        "bias": "all",
        "target_modules": ["v_proj", "o_proj"],
    },
}


def inspect(folder: Path, base: BaseModel) -> tuple[Manifest, bytes]:
    """The manifest and the image of the adapter that was saved in ``folder``."""
    make_old(folder / NAME)
    inspector, deriver = deriver_of(folder, base)
    manifest = inspector.inspect(AdapterId(1), str(folder / NAME))
    adapter = deriver.complete(source_of(manifest), threading.Event())
    return manifest, read_open(adapter, manifest)


def image_of(base: BaseModel, manifest: Manifest, payload: bytes) -> LoraImage:
    """The image that the loader has made, as the pool takes it."""
    ranks = {(module.stage, module.module): module.rank for module in manifest.modules}
    values = torch.frombuffer(bytearray(payload), dtype=torch.float32)
    factors: dict[tuple[int, str], dict[EntryKind, torch.Tensor]] = {}
    for stage, layout in enumerate(layout_image(base, manifest.modules).stages):
        for entry in layout.entries:
            start = (layout.offset + entry.offset) // values.itemsize
            factor = values[start : start + entry.rows * entry.columns]
            place = stage, entry.module
            factors.setdefault(place, {})[entry.kind] = factor.view(entry.rows, entry.columns)
    pairs = {
        place: (
            each[EntryKind.LORA_A][: ranks[place]],
            each[EntryKind.LORA_B][:, : ranks[place]],
        )
        for place, each in factors.items()
    }
    row_scales, biases = (
        {place: each[kind].flatten() for place, each in factors.items() if kind in each}
        for kind in (EntryKind.ROW_SCALE, EntryKind.BIAS)
    )
    return make_image(base, list(manifest.modules), pairs, row_scales, biases)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_file_of_peft_gives_pefts_logits(family: str, field: str, tmp_path: Path) -> None:
    fields = {"r": 8, "lora_alpha": 10, "target_modules": "all-linear"} | FIELDS[field]
    oracle = Oracle(family, tmp_path / "base", {NAME: fields})
    oracle.save_adapters(tmp_path)
    rig = Rig(tmp_path / "base", open_device(DeviceKind.CPU))
    adapter_id = rig.install(1, image_of(rig.base, *inspect(tmp_path, rig.base)))
    source = random.Random(field)
    token_ids = [source.randrange(VOCAB_SIZE) for _ in range(23)]
    sequence = rig.sequence(token_ids, adapter_id)
    (prefilled,) = rig.advance((sequence, 20))
    decoded = [rig.advance((sequence, 1))[0] for _ in range(3)]
    expected = oracle.logits(NAME, token_ids)
    assert (torch.cat([prefilled, *decoded]) - expected).abs().max() < TOLERANCE
    (of_base,) = rig.advance((rig.sequence(token_ids), len(token_ids)))
    assert (of_base - expected).abs().max() > CLEARLY
