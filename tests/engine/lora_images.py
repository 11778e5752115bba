"""Builds adapter images for tests, straight from PEFT's layers."""

import re
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import pad

from engine.device import torch_dtype
from engine.lora.pool import AdapterPool
from ipc.base_model import BaseModel
from ipc.image import AdapterModule, EntryKind, ImageLayout, layout_image, padded_rank
from ipc.messages import AdapterId

# 0xFF in every byte is a NaN of float32, float16 and bfloat16.
POISON = 0xFF


@dataclass(frozen=True)
class LoraImage:
    """One adapter: its modules and, by ``(stage, module)``, the unpadded A and B."""

    modules: tuple[AdapterModule, ...]
    pairs: dict[tuple[int, str], tuple[Tensor, Tensor]]
    layout: ImageLayout

    def stage_bytes(self, base: BaseModel, stage: int) -> Tensor:
        """The stage's bytes; what no entry covers is poison."""
        stage_layout = self.layout.stages[stage]
        image = torch.full((stage_layout.num_bytes,), POISON, dtype=torch.uint8)
        for entry in stage_layout.entries:
            a, b = self.pairs[stage, entry.module]
            rank = a.shape[0]
            padding = padded_rank(rank) - rank
            if entry.kind is EntryKind.LORA_A:
                values = pad(a, (0, 0, 0, padding))
            else:
                values = pad(b, (0, padding))
            raw = values.to(torch_dtype(base.dtype)).contiguous().view(torch.uint8).flatten()
            image[entry.offset : entry.offset + entry.num_bytes] = raw
        return image


def image_of_peft(base: BaseModel, layers: dict[str, LoraLayer], adapter: str) -> LoraImage:
    """The image of one of a PEFT model's adapters."""
    modules: list[AdapterModule] = []
    pairs: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for path, layer in layers.items():
        if adapter not in layer.lora_A:
            continue
        found = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)", path)
        assert found, path
        stage, name = base.layer_stage(int(found[1])), found[2]
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        modules.append(AdapterModule(stage, name, a.shape[0], layer.scaling[adapter]))
        pairs[stage, name] = (a, b)
    return make_image(base, modules, pairs)


def make_image(
    base: BaseModel,
    modules: list[AdapterModule],
    pairs: dict[tuple[int, str], tuple[Tensor, Tensor]],
) -> LoraImage:
    return LoraImage(tuple(modules), pairs, layout_image(base, modules))


class ScatteredPool:
    """A pool in which stages lie far apart, in falling order, between poisoned gaps."""

    def __init__(self, base: BaseModel, pool: AdapterPool) -> None:
        self._base = base
        self._pool = pool
        self._free_below = pool.num_bytes // 128 * 128
        pool.extent_view(0, pool.num_bytes).fill_(POISON)

    def install(self, adapter_id: AdapterId, image: LoraImage) -> None:
        extents = []
        for stage, num_bytes in enumerate(image.layout.stage_bytes):
            self._free_below -= num_bytes + 128 * (1 + stage % 3)
            extents.append(self._free_below if num_bytes else -1)
            if num_bytes:
                view = self._pool.extent_view(self._free_below, num_bytes)
                view.copy_(image.stage_bytes(self._base, stage))
        self._pool.install(adapter_id, image.modules, image.layout, tuple(extents))
