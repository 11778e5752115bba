"""The adapters' part of a linear layer on a GPU: our own kernels behind ``LoraBackend``.

Segments of few rows and segments of many are computed by different kernels: the former are bound
by reading the adapters' weights, the latter by reading and writing the rows. What a step's rows
need is found out once, for all layers, and handed to the kernels as data.
"""

import torch
from torch import Tensor

from engine.device import Device, torch_dtype
from engine.lora.kernels.shapes import Weights
from engine.lora.launches import (
    LargeSegments,
    LoraLaunches,
    LoraTuning,
    ModuleGroup,
    SmallSegments,
)
from engine.lora.pool import AdapterPool
from engine.lora.segments import Segment
from engine.lora.table import AdapterTable, views
from engine.lora.work import UNIT_WORDS, RowSegment, list_row_tiles, list_units
from ipc.base_model import BaseModel
from ipc.image import ENTRY_ALIGNMENT


class TritonLora:
    """Adds deltas with weights out of the pool's arena, where ``table`` says that they lie.

    Everything it launches goes to the current stream, which must be the forward stream.
    ``max_rows`` bounds the rows of a step, ``max_rank`` the adapters' ranks.
    """

    def __init__(
        self,
        base: BaseModel,
        pool: AdapterPool,
        table: AdapterTable,
        device: Device,
        max_rows: int,
        max_rank: int,
        tuning: LoraTuning | None = None,
    ) -> None:
        self._table = table
        self._device = device
        self._tuning = tuning or LoraTuning()
        self._max_small_rows = min(self._tuning.max_small_rows, max_rows)
        raw = pool.extent_view(0, pool.num_bytes // ENTRY_ALIGNMENT * ENTRY_ALIGNMENT)
        weights = Weights(raw.view(torch_dtype(base.dtype)), *views(table.records))
        self._launches = LoraLaunches(
            base, weights, max_rows, self._max_small_rows, max_rank, self._tuning
        )

    def warm_up(self) -> None:
        """Compiles every kernel that an eager step may need; before any adapter is resident.

        Those of graph steps are compiled by their first launch, which comes before a capture.
        """
        with self._device.forward_stream():
            self._launches.warm_up()

    def begin(self, segments: tuple[Segment, ...]) -> "EagerStep":
        """A step whose launches are for these segments alone.

        Its list of work has memory of its own: another step may begin before this one is launched.
        """
        small, large = self._divide(segments)
        parts: list[SmallSegments | LargeSegments] = []
        if small:
            units = self._device.upload(list_units(small, self._tuning.unit_shape()))
            num_rows = sum(segment.num_rows for segment in small)
            parts.append(SmallSegments(self._launches, units, num_rows))
        if large:
            listed = list_row_tiles(large, self._tuning.shrink_many.tile_rows)
            tiles = self._device.upload(listed)
            max_rank = max(segment.max_rank for segment in large)
            parts.append(LargeSegments(self._launches, tiles, max_rank))
        return EagerStep(tuple(parts))

    def graph_step(self, max_rows: int) -> "GraphStep":
        """A step to be captured once and replayed for any segments of ``max_rows`` rows in all."""
        assert max_rows <= self._max_small_rows, (max_rows, self._max_small_rows)
        return GraphStep(self._launches, self._table, self._device, max_rows, self._tuning)

    def _divide(self, segments: tuple[Segment, ...]) -> tuple[list[RowSegment], list[RowSegment]]:
        """Small and large segments."""
        small: list[RowSegment] = []
        large: list[RowSegment] = []
        room = self._max_small_rows
        for segment in _row_segments(segments, self._table):
            if segment.num_rows <= min(self._tuning.max_few_rows, room):
                small.append(segment)
                room -= segment.num_rows
            else:
                large.append(segment)
        return small, large


class EagerStep:
    """A step that is launched kernel by kernel."""

    def __init__(self, parts: tuple[SmallSegments | LargeSegments, ...]) -> None:
        self.parts = parts

    def add(self, layer: int, group: ModuleGroup, x: Tensor, out: Tensor) -> None:
        # One after the other: they share scratch memory.
        for part in self.parts:
            part.shrink(layer, group, x)
            part.expand(layer, group, out)


class GraphStep:
    """Owns a list of work at a fixed place: its launches can be captured in a CUDA graph.

    The launches compute what the last ``fill`` before them says; at first, nothing. Their grids
    depend on ``max_rows`` alone.
    """

    def __init__(
        self,
        launches: LoraLaunches,
        table: AdapterTable,
        device: Device,
        max_rows: int,
        tuning: LoraTuning,
    ) -> None:
        self._table = table
        self._max_rows = max_rows
        self._shape = tuning.unit_shape()
        shape = (1 + self._shape.max_units(max_rows), UNIT_WORDS)
        self._units = torch.zeros(shape, dtype=torch.int32, device=device.torch_device)
        self._device = device
        self.segments = SmallSegments(launches, self._units, max_rows)

    def fill(self, segments: tuple[Segment, ...]) -> None:
        """Launches and replays from now on are for these segments; does not wait for others.

        All their adapters are resident. What was launched before is not affected.
        """
        found = _row_segments(segments, self._table)
        assert sum(segment.num_rows for segment in found) <= self._max_rows, segments
        listed = list_units(found, self._shape)
        self._device.upload_into(listed, self._units[: len(listed)])

    def add(self, layer: int, group: ModuleGroup, x: Tensor, out: Tensor) -> None:
        # Side by side, so that the B's are read while the shrinking still runs. Measured with the
        # shrinking ahead of the base model's product: 0.1 to 0.4 ms a step slower.
        self.segments.shrink(layer, group, x)
        self.segments.expand(layer, group, out)


def _row_segments(segments: tuple[Segment, ...], table: AdapterTable) -> list[RowSegment]:
    """Those with rows and with low-rank pairs, by their adapters' places in the table."""
    found = []
    for segment in segments:
        entry = table.entry(segment.adapter_id)
        if segment.start < segment.stop and entry.max_rank:
            found.append(RowSegment(entry.index, entry.max_rank, segment.start, segment.stop))
    return found
