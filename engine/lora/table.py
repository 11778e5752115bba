"""Where the kernels find each resident adapter: one small table in device memory.

A resident adapter has an *index*, a small number that the rows of a step refer to. For each index,
decoder layer and linear there is a record of 64 bytes:

| bytes  | type  | holds                                                                         |
|--------|-------|-------------------------------------------------------------------------------|
| 0-7    | int64 | first element of the group's A's, which stand together, in the arena          |
| 8-15   | int64 | first element of this linear's B                                              |
| 16-19  | int32 | rows of the group's A's: the sum of their padded ranks                        |
| 20-23  | int32 | the first of them that is this linear's                                       |
| 24-27  | int32 | this linear's padded rank; 0: the adapter leaves it as it is                  |
| 28-31  | fp32  | this linear's scaling                                                         |
| 32-39  | int64 | first element of its row scale, for DoRA; -1: none                            |
| 40-47  | int64 | first element of its bias; -1: none                                           |
| 48-63  |       | unused                                                                        |

Offsets count elements of the entry's own dtype from the arena's start. A group's A's are one
matrix ``[sum of ranks, in]``, since an image lays them end to end: the kernels treat them as such.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.device import Device
from engine.lora.pool import check_served
from ipc.base_model import LINEAR_GROUPS, LINEAR_MODULES, BaseModel
from ipc.errors import Internal
from ipc.image import ENTRY_ALIGNMENT, AdapterModule, Entry, EntryKind, ImageLayout, padded_rank
from ipc.messages import AdapterId

RECORD = np.dtype(
    {
        "names": ["a", "b", "group_rank", "first_rank", "rank", "scaling", "row_scale", "bias"],
        "formats": ["<i8", "<i8", "<i4", "<i4", "<i4", "<f4", "<i8", "<i8"],
        "offsets": [0, 8, 16, 20, 24, 28, 32, 40],
        "itemsize": 64,
    }
)

# fp32, whatever the model's dtype is.
_ROW_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class TableEntry:
    """What a step must know of a resident adapter.

    ``max_rank`` is its largest padded rank; ``scales_rows`` says whether it has any row scale.
    """

    index: int
    max_rank: int
    scales_rows: bool


class AdapterTable:
    """Owns the table on the device, ``[max_adapters, num_layers, num_linears]`` records.

    All of it belongs to the step thread. Nothing here waits for the device, and what was launched
    before a change finds the table as it was.
    """

    def __init__(self, base: BaseModel, max_adapters: int, device: Device) -> None:
        # Else the A's of a group would not lie end to end.
        assert all(
            shape.in_features * padded_rank(1) * base.dtype.num_bytes % ENTRY_ALIGNMENT == 0
            for shape in base.linears
        ), base.linears
        self._base = base
        shape = (max_adapters, base.num_layers, len(LINEAR_MODULES))
        # There before whatever ``install`` brings, which goes to the same stream.
        with device.forward_stream():
            self.records = torch.zeros(
                (*shape, RECORD.itemsize // 8), dtype=torch.int64, device=device.torch_device
            )
        self._device = device
        self._entries: dict[AdapterId, TableEntry] = {}
        # In the order in which they became free.
        self._free = deque(range(max_adapters))

    def install(
        self,
        adapter_id: AdapterId,
        modules: tuple[AdapterModule, ...],
        layout: ImageLayout,
        extents: tuple[int, ...],
    ) -> None:
        """Steps from now on may name the adapter; arguments as for ``AdapterPool.install``.

        Raises:
            AdapterInvalid: the adapter has a part that the forward pass does not apply.
            Internal: every index is in use.
        """
        assert adapter_id not in self._entries, adapter_id
        check_served(self._base, layout)
        if not self._free:
            raise Internal(f"adapter {adapter_id}: the table's {len(self._entries)} rows are full")
        records = self._describe(modules, layout, extents)
        index = self._free.popleft()
        self._device.upload_into(records, self.records[index])
        self._entries[adapter_id] = TableEntry(
            index, int(records["rank"].max(initial=0)), bool((records["row_scale"] >= 0).any())
        )

    def remove(self, adapter_id: AdapterId) -> None:
        """No later step names the adapter; steps that were launched may still read its records."""
        self._free.append(self._entries.pop(adapter_id).index)

    def entry(self, adapter_id: AdapterId) -> TableEntry:
        """A ``KeyError`` if it is not resident: it must never pass for the base."""
        return self._entries[adapter_id]

    def _describe(
        self, modules: tuple[AdapterModule, ...], layout: ImageLayout, extents: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """One adapter's records, ``[num_layers, num_linears]``."""
        scalings: dict[int, list[tuple[str, float]]] = {}
        for module in modules:
            scalings.setdefault(module.stage, []).append((module.module, module.scaling))
        stages = [self._base.layer_stage(layer) for layer in range(self._base.num_layers)]
        # An adapter's layers are nearly always alike, and this runs between two steps. Entries that
        # are equal are then the same: comparing hundreds of them would take most of the time.
        alike: dict[tuple[int, tuple[tuple[str, float], ...]], list[int]] = {}
        for layer, stage in enumerate(stages):
            key = id(layout.stages[stage].entries), tuple(scalings.get(stage, ()))
            alike.setdefault(key, []).append(layer)
        records = np.empty((len(stages), len(LINEAR_MODULES)), RECORD)
        for (_, of_stage), layers in alike.items():
            entries = layout.stages[stages[layers[0]]].entries
            records[layers] = _describe_layer(entries, of_stage, self._base.dtype.num_bytes)
        start_bytes = np.array([extents[stage] for stage in stages])[:, None]
        starts = start_bytes // self._base.dtype.num_bytes
        records["a"] += starts
        records["b"] += starts
        records["row_scale"] += np.where(
            records["row_scale"] >= 0, start_bytes // _ROW_SCALE_BYTES, 0
        )
        records["bias"] += np.where(records["bias"] >= 0, starts, 0)
        return records


def views(records: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``records`` as int64, int32 and fp32: the same memory."""
    return records, records.view(torch.int32), records.view(torch.float32)


def _describe_layer(
    entries: tuple[Entry, ...], scalings: tuple[tuple[str, float], ...], itemsize: int
) -> npt.NDArray[Any]:
    """One layer's records ``[num_linears]``, with offsets from its extent's start."""
    records = np.zeros(len(LINEAR_MODULES), RECORD)
    records["row_scale"] = records["bias"] = -1
    found = {(entry.kind, entry.module): entry for entry in entries}
    scaling_of = dict(scalings)
    for group in LINEAR_GROUPS:
        first = LINEAR_MODULES.index(group[0])
        of_group = records[first : first + len(group)]
        rank = 0
        for record, name in zip(of_group, group, strict=True):
            a = found.get((EntryKind.LORA_A, name))
            if a is None:
                continue
            start = a.offset // itemsize
            if rank == 0:
                of_group["a"] = start
            assert start == of_group["a"][0] + rank * a.columns, (name, entries)
            record["b"] = found[EntryKind.LORA_B, name].offset // itemsize
            record["first_rank"], record["rank"] = rank, a.rows
            record["scaling"] = scaling_of[name]
            if row_scale := found.get((EntryKind.ROW_SCALE, name)):
                record["row_scale"] = row_scale.offset // _ROW_SCALE_BYTES
            if bias := found.get((EntryKind.BIAS, name)):
                record["bias"] = bias.offset // itemsize
            rank += a.rows
        of_group["group_rank"] = rank
    return records
