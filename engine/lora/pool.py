"""The adapter pool: one arena of device memory, and where in it each resident adapter lies.

It decides nothing: which bytes are whose is settled by the slot allocator, when an adapter comes
and goes by residency.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.device import Device, torch_dtype
from ipc.base_model import BaseModel
from ipc.errors import AdapterInvalid
from ipc.image import ENTRY_ALIGNMENT, AdapterModule, Entry, EntryKind, ImageLayout, StageLayout
from ipc.messages import AdapterId


class LoraWeights(NamedTuple):
    """What one adapter has for one linear, as views into the arena.

    ``a`` is ``[padded_rank, in]``, ``b`` ``[out, padded_rank]``; the padding is zeros. ``bias`` is
    ``[out]``, in the model's dtype as the pair is, ``row_scale`` ``[out]`` fp32.
    """

    a: Tensor
    b: Tensor
    scaling: float
    row_scale: Tensor | None = None
    bias: Tensor | None = None


class AdapterPool:
    """Owns ``num_bytes`` of device memory and the table of the adapters that lie in it.

    ``install``, ``remove`` and ``weights`` belong to the step thread; ``extent_view`` may be called
    from any.
    """

    def __init__(self, base: BaseModel, num_bytes: int, device: Device) -> None:
        self._base = base
        self._dtype = torch_dtype(base.dtype)
        self._arena = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
        self._resident: dict[AdapterId, dict[tuple[int, str], LoraWeights]] = {}

    @property
    def num_bytes(self) -> int:
        return self._arena.numel()

    @property
    def resident(self) -> frozenset[AdapterId]:
        """The adapters that rows may ask for."""
        return frozenset(self._resident)

    def extent_view(self, offset: int, num_bytes: int) -> Tensor:
        """Bytes ``[offset, offset + num_bytes)`` of the arena, uint8, to be written through."""
        assert 0 <= offset <= offset + num_bytes <= self.num_bytes, (offset, num_bytes)
        return self._arena[offset : offset + num_bytes]

    def install(
        self,
        adapter_id: AdapterId,
        modules: tuple[AdapterModule, ...],
        layout: ImageLayout,
        extents: tuple[int, ...],
    ) -> None:
        """Rows may ask for the adapter from now on: its bytes lie at ``extents``.

        ``extents[i]`` is the arena offset of stage ``i``, a multiple of 128; that of an empty stage
        is not looked at. ``layout`` is what ``layout_image`` gives for ``modules``.

        Raises:
            AdapterInvalid: the adapter has a part that the forward pass does not apply.
        """
        assert adapter_id not in self._resident, adapter_id
        assert len(extents) == len(layout.stages), (len(extents), len(layout.stages))
        check_served(self._base, layout)
        scalings = {(module.stage, module.module): module.scaling for module in modules}
        table: dict[tuple[int, str], LoraWeights] = {}
        for stage, (stage_layout, extent) in enumerate(zip(layout.stages, extents, strict=True)):
            # The others are the vocabulary's, see ``engine.lora.vocab``.
            if not 0 < stage < self._base.head_stage or not stage_layout.num_bytes:
                continue
            assert extent % ENTRY_ALIGNMENT == 0, (stage, extent)
            parts: dict[str, dict[EntryKind, Tensor]] = {}
            for entry in stage_layout.entries:
                parts.setdefault(entry.module, {})[entry.kind] = self._view(extent, entry)
            layer = stage - self._base.layer_stage(0)
            for module, of_module in parts.items():
                table[layer, module] = LoraWeights(
                    of_module[EntryKind.LORA_A],
                    of_module[EntryKind.LORA_B],
                    scalings[stage, module],
                    of_module.get(EntryKind.ROW_SCALE),
                    of_module.get(EntryKind.BIAS),
                )
        self._resident[adapter_id] = table

    def remove(self, adapter_id: AdapterId) -> None:
        """No row asks for the adapter any more. Its bytes stay until somebody overwrites them."""
        del self._resident[adapter_id]

    def weights(self, adapter_id: AdapterId, layer: int, module: str) -> LoraWeights | None:
        """What it has for one linear; None if the adapter leaves it as it is.

        An adapter that is not resident is a ``KeyError``: it must never pass for the base.
        """
        return self._resident[adapter_id].get((layer, module))

    def _view(self, extent: int, entry: Entry) -> Tensor:
        raw = self.extent_view(extent + entry.offset, entry.num_bytes)
        if entry.kind is EntryKind.ROW_SCALE:
            return raw.view(torch.float32)
        values = raw.view(self._dtype)
        return values if entry.kind is EntryKind.BIAS else values.view(entry.rows, entry.columns)


def check_served(base: BaseModel, layout: ImageLayout) -> None:
    """Returns if the forward pass applies every entry of the image.

    Raises:
        AdapterInvalid: it does not.
    """
    # Layers that are alike share their entries, and this runs between two steps.
    checked: set[tuple[bool, int]] = set()
    for stage, stage_layout in enumerate(layout.stages):
        in_layer = 0 < stage < base.head_stage
        seen = in_layer, id(stage_layout.entries)
        if seen not in checked:
            checked.add(seen)
            _check_stage(stage, in_layer, stage_layout)


def _check_stage(stage: int, in_layer: bool, layout: StageLayout) -> None:
    for entry in layout.entries:
        match entry.kind:
            case EntryKind.LORA_A | EntryKind.LORA_B:
                is_served = True
            case EntryKind.ROW_SCALE | EntryKind.BIAS:
                is_served = in_layer and _has_pair(layout, entry.module)
            case EntryKind.WHOLE:
                is_served = not in_layer
        if not is_served:
            raise AdapterInvalid(
                f"stage {stage} of the adapter: expected low-rank pairs, those of the decoder"
                " layers' linears with row scales and biases beside them, or the embedding or head"
                f" whole, got {entry.kind.value} of {entry.module}"
            )


def _has_pair(layout: StageLayout, module: str) -> bool:
    return any(
        entry.kind is EntryKind.LORA_B and entry.module == module for entry in layout.entries
    )
