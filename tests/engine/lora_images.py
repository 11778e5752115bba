"""Builds adapter images for tests, straight from PEFT's layers."""

import re
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import pad

from engine.device import torch_dtype
from engine.lora.pool import AdapterPool
from engine.lora.slots import ResidentTable
from ipc.base_model import BaseModel
from ipc.image import AdapterModule, EntryKind, ImageLayout, layout_image, padded_rank
from ipc.messages import AdapterId

ModuleKey = tuple[int, str]
"""A stage and a module's name."""

# 0xFF in every byte is a NaN of float32, float16 and bfloat16.
POISON = 0xFF


class Image(Protocol):
    """One adapter's bytes."""

    @property
    def modules(self) -> tuple[AdapterModule, ...]: ...

    @property
    def layout(self) -> ImageLayout: ...

    def stage_bytes(self, base: BaseModel, stage: int) -> Tensor:
        """``[num_bytes]`` uint8 of the stage."""
        ...


@dataclass(frozen=True)
class LoadedImage:
    """An image that the loader has made: ``payload`` are its bytes."""

    modules: tuple[AdapterModule, ...]
    layout: ImageLayout
    payload: bytes

    def stage_bytes(self, base: BaseModel, stage: int) -> Tensor:
        of_stage = self.layout.stages[stage]
        image = torch.frombuffer(bytearray(self.payload), dtype=torch.uint8)
        return image[of_stage.offset : of_stage.offset + of_stage.num_bytes]


@dataclass(frozen=True)
class LoraImage:
    """One adapter: its modules and, by ``(stage, module)``, what they hold, A and B unpadded."""

    modules: tuple[AdapterModule, ...]
    pairs: dict[ModuleKey, tuple[Tensor, Tensor]]
    layout: ImageLayout
    row_scales: dict[ModuleKey, Tensor] = field(default_factory=dict)
    biases: dict[ModuleKey, Tensor] = field(default_factory=dict)

    def stage_bytes(self, base: BaseModel, stage: int) -> Tensor:
        """The stage's bytes; what no entry covers is poison."""
        stage_layout = self.layout.stages[stage]
        image = torch.full((stage_layout.num_bytes,), POISON, dtype=torch.uint8)
        for entry in stage_layout.entries:
            key = (stage, entry.module)
            a, b = self.pairs[key]
            padding = padded_rank(len(a)) - len(a)
            dtype = torch_dtype(base.dtype)
            match entry.kind:
                case EntryKind.LORA_A:
                    values = pad(a, (0, 0, 0, padding))
                case EntryKind.LORA_B:
                    values = pad(b, (0, padding))
                case EntryKind.ROW_SCALE:
                    values, dtype = self.row_scales[key], torch.float32
                case EntryKind.BIAS:
                    values = self.biases[key]
                case EntryKind.WHOLE:
                    raise ValueError(f"{key}: expected a part of a linear, got {entry.kind}")
            raw = values.to(dtype).contiguous().view(torch.uint8).flatten()
            image[entry.offset : entry.offset + entry.num_bytes] = raw
        return image


def image_of_peft(base: BaseModel, layers: dict[str, LoraLayer], adapter: str) -> LoraImage:
    """The image of one of a PEFT model's adapters."""
    modules: list[AdapterModule] = []
    pairs: dict[ModuleKey, tuple[Tensor, Tensor]] = {}
    row_scales: dict[ModuleKey, Tensor] = {}
    biases: dict[ModuleKey, Tensor] = {}
    for path, layer in layers.items():
        if adapter not in layer.lora_A:
            continue
        found = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.(\w+)", path)
        assert found, path
        stage, name = base.layer_stage(int(found[1])), found[2]
        a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
        scaling = layer.scaling[adapter]
        pairs[stage, name] = (a, b)
        if adapter in layer.lora_magnitude_vector:
            linear = layer.get_base_layer()
            norms = (linear.weight + scaling * b @ a).detach().norm(dim=1)
            row_scale = layer.lora_magnitude_vector[adapter].weight.detach() / norms
            row_scales[stage, name] = row_scale
            if linear.bias is not None:
                # What the row scale must not apply to, see ``ipc.image``.
                biases[stage, name] = (1 - row_scale) * linear.bias.detach()
        modules.append(AdapterModule(stage, name, len(a), scaling))
    return make_image(base, modules, pairs, row_scales, biases)


def make_image(
    base: BaseModel,
    modules: list[AdapterModule],
    pairs: dict[ModuleKey, tuple[Tensor, Tensor]],
    row_scales: dict[ModuleKey, Tensor] | None = None,
    biases: dict[ModuleKey, Tensor] | None = None,
) -> LoraImage:
    """An image in which these modules have those row scales and biases as well."""
    row_scales, biases = row_scales or {}, biases or {}
    complete = tuple(
        msgspec.structs.replace(
            module,
            row_scale=(module.stage, module.module) in row_scales,
            bias=(module.stage, module.module) in biases,
        )
        for module in modules
    )
    return LoraImage(complete, pairs, layout_image(base, complete), row_scales, biases)


class ScatteredPool:
    """A pool in which stages lie far apart, in falling order, between poisoned gaps."""

    def __init__(self, base: BaseModel, pool: AdapterPool, *others: ResidentTable) -> None:
        """Adapters come into the tables ``others`` as well."""
        self._base = base
        self._pool = pool
        self._tables = (pool, *others)
        self._free_below = pool.num_bytes // 128 * 128
        pool.extent_view(0, pool.num_bytes).fill_(POISON)

    def install(self, adapter_id: AdapterId, image: Image) -> None:
        extents = []
        for stage, num_bytes in enumerate(image.layout.stage_bytes):
            self._free_below -= num_bytes + 128 * (1 + stage % 3)
            extents.append(self._free_below if num_bytes else -1)
            if num_bytes:
                view = self._pool.extent_view(self._free_below, num_bytes)
                view.copy_(image.stage_bytes(self._base, stage))
        for table in self._tables:
            table.install(adapter_id, image.modules, image.layout, tuple(extents))
