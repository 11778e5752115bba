"""The adapters' part of a linear layer on a GPU: our own kernels behind ``LoraBackend``.

Segments of few rows and segments of many are computed by different kernels: the former are bound
by reading the adapters' weights, the latter by reading and writing the rows. What a step's rows
need is found out once, for all layers, and handed to the kernels as data.
"""

import numpy as np
import torch
from torch import Tensor

from engine.device import Device, torch_dtype
from engine.lora.delta import Delta, Projected
from engine.lora.graph_variant import GraphVariant
from engine.lora.kernels.shapes import Weights
from engine.lora.launches import (
    LargeSegments,
    LoraLaunches,
    LoraTuning,
    ModuleGroup,
    SmallSegments,
)
from engine.lora.linear import Product
from engine.lora.pool import AdapterPool
from engine.lora.segments import Segment
from engine.lora.side_stream import SideStream
from engine.lora.table import AdapterTable, views
from engine.lora.work import (
    UNIT_WORDS,
    RowSegment,
    flag_rows,
    list_row_tiles,
    list_units,
    num_flag_rows,
    num_row_tiles,
)
from ipc.base_model import LINEAR_GROUPS, BaseModel
from ipc.image import ENTRY_ALIGNMENT


def weights_in(pool: AdapterPool, table: AdapterTable, base: BaseModel) -> Weights:
    """What kernels find of the adapters that lie in ``pool``, where ``table`` says."""
    raw = pool.extent_view(0, pool.num_bytes // ENTRY_ALIGNMENT * ENTRY_ALIGNMENT)
    arena, row_scales = raw.view(torch_dtype(base.dtype)), raw.view(torch.float32)
    return Weights(arena, row_scales, *views(table.records))


class TritonLora:
    """Applies adapters out of the pool's arena, where ``table`` says that they lie.

    Everything it launches goes to the current stream, which must be the forward stream, or to a
    side stream that is forked from it and joined again.
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
        weights = weights_in(pool, table, base)
        self._launches = LoraLaunches(
            base, weights, max_rows, self._max_small_rows, max_rank, self._tuning
        )
        self._fork = None
        if self._tuning.forks:
            self._fork = Fork(base, self._max_small_rows, device.torch_device, self._tuning)

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
            parts.append(LargeSegments(self._launches, tiles, max_rank, len(listed)))
        return EagerStep(tuple(parts))

    def tiled_steps(self, max_rows: int) -> "TiledSteps":
        """Steps of up to ``max_rows`` rows to be captured once and replayed for any segments."""
        return TiledSteps(
            self._launches,
            self._table,
            self._device,
            max_rows,
            self._tuning.shrink_many.tile_rows,
            self._launches.max_rank,
        )

    def graph_step(self, max_rows: int) -> "GraphStep":
        """A step to be captured once and replayed for any segments of ``max_rows`` rows in all."""
        assert max_rows <= self._max_small_rows, (max_rows, self._max_small_rows)
        return GraphStep(
            self._launches, self._table, self._device, max_rows, self._tuning, self._fork
        )

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
    """Changes each product as its parts' adapters do, in launches behind it."""

    def __init__(self, parts: tuple[SmallSegments | LargeSegments, ...]) -> None:
        self.parts = parts

    def project(self, layer: int, group: ModuleGroup, x: Tensor, product: Product) -> Projected:
        out = product()
        # One after the other: they share scratch memory.
        for part in self.parts:
            part.shrink(layer, group, x)
            part.expand(layer, group, out)
        return Projected(out)


class TiledSteps:
    """Owns a list of row tiles at a fixed place: launches of all segments as large ones.

    There are tiles for one segment of as many rows as a step has, and some to spare for where
    several segments end.
    """

    _NUM_SPARE = 4
    # What the launches are cut up for: few ranks are read by many programs.
    _RANKS = (16, 64)

    def __init__(
        self,
        launches: LoraLaunches,
        table: AdapterTable,
        device: Device,
        max_rows: int,
        tile_rows: int,
        max_rank: int,
    ) -> None:
        self.ranks = (*(rank for rank in self._RANKS if rank < max_rank), max_rank)
        self._launches = launches
        self._table = table
        self._device = device
        self._tile_rows = tile_rows
        shape = (self._num_tiles(max_rows), 4)
        # There before whatever ``fill`` brings, which goes to the same stream.
        with device.forward_stream():
            self._tiles = torch.zeros(shape, dtype=torch.int32, device=device.torch_device)

    def step(self, num_rows: int, max_rank: int) -> EagerStep:
        """Launches for what the last ``fill`` with so many rows says; at first, nothing."""
        tiles = self._tiles[: self._num_tiles(num_rows)]
        num_used = -(-num_rows // self._tile_rows)
        return EagerStep((LargeSegments(self._launches, tiles, max_rank, num_used),))

    def fits(self, segments: tuple[Segment, ...], num_rows: int) -> bool:
        """Whether a step of ``num_rows`` rows has tiles for these segments."""
        found = _row_segments(segments, self._table)
        return num_row_tiles(found, self._tile_rows) <= self._num_tiles(num_rows)

    def fill(self, segments: tuple[Segment, ...], num_rows: int) -> int:
        """Launches of ``num_rows`` rows from now on are for these segments, which fit.

        Returns for which of ``ranks`` the launches must be. What was launched before is not
        affected.
        """
        found = _row_segments(segments, self._table)
        tiles = np.zeros((self._num_tiles(num_rows), 4), dtype=np.int32)
        listed = list_row_tiles(found, self._tile_rows)
        tiles[: len(listed)] = listed
        self._device.upload_into(tiles, self._tiles[: len(tiles)])
        most = max((each.max_rank for each in found), default=0)
        return next(rank for rank in self.ranks if rank >= most)

    def _num_tiles(self, num_rows: int) -> int:
        return -(-num_rows // self._tile_rows) + self._NUM_SPARE


class Fork:
    """Owns what launches beside the base model's products need: a stream, and the deltas' memory.

    The product goes to the stream beside, and the adapters' launches stay behind the one that makes
    ``x``: so they begin before that has ended, with the first of the weights, and find room on the
    multiprocessors, of which the library's products leave none.

    One buffer does for all projections. The launch that uses up a delta makes, itself, the ``x`` of
    the next projection, or stands ahead of the launch that does; and the next adapters' launches
    wait for that ``x``, so nothing writes a delta while an earlier one is still read.
    """

    def __init__(
        self, base: BaseModel, max_rows: int, device: torch.device, tuning: LoraTuning
    ) -> None:
        self.stream = SideStream(device)
        self.overlaps = tuning.overlaps
        widths = (sum(base.linear(name).out_features for name in names) for names in LINEAR_GROUPS)
        self._values = torch.empty(max_rows * max(widths), device=device)

    def values(self, num_rows: int, width: int) -> Tensor:
        """``[num_rows, width]`` fp32: the same memory each time, holding anything."""
        return self._values[: num_rows * width].view(num_rows, width)


class GraphStep:
    """Owns a list of work at a fixed place: its launches can be captured in a CUDA graph.

    The launches compute what the last ``fill`` before them says; at first, nothing. Their grids
    depend on ``max_rows`` alone. With a ``fork`` they run beside the product, and the delta comes
    apart; those of ``in_place`` run behind the product, which they change.
    """

    def __init__(
        self,
        launches: LoraLaunches,
        table: AdapterTable,
        device: Device,
        max_rows: int,
        tuning: LoraTuning,
        fork: Fork | None,
    ) -> None:
        self._table = table
        self._max_rows = max_rows
        self._shape = tuning.unit_shape()
        # The rows' flags stand ahead of the units: so one upload brings both.
        num_flags = num_flag_rows(max_rows)
        shape = (num_flags + 1 + self._shape.max_units(max_rows), UNIT_WORDS)
        # There before whatever ``fill`` brings, which goes to the same stream.
        with device.forward_stream():
            self._work = torch.zeros(shape, dtype=torch.int32, device=device.torch_device)
        self._has_adapter = self._work[:num_flags].view(-1)[:max_rows]
        self._device = device
        self._fork = fork
        self.segments = SmallSegments(launches, self._work[num_flags:], max_rows)
        # Side by side, so that the B's are read while the shrinking still runs. Measured with the
        # shrinking ahead of the base model's product: 0.1 to 0.4 ms a step slower.
        self.in_place = EagerStep((self.segments,))

    def fill(self, segments: tuple[Segment, ...]) -> GraphVariant:
        """Launches and replays from now on are for these segments; does not wait for others.

        All their adapters are resident. What was launched before is not affected. Returns which
        launches can compute them.
        """
        found = _row_segments(segments, self._table)
        assert sum(segment.num_rows for segment in found) <= self._max_rows, segments
        flags = flag_rows(found, self._max_rows)
        listed = np.concatenate((flags, list_units(found, self._shape)))
        self._device.upload_into(listed, self._work[: len(listed)])
        scales_rows = any(self._table.entry(each.adapter_id).scales_rows for each in segments)
        return GraphVariant.IN_PLACE if scales_rows else GraphVariant.BESIDE

    def project(self, layer: int, group: ModuleGroup, x: Tensor, product: Product) -> Projected:
        if self._fork is not None:
            return self._project_beside(self._fork, layer, group, x, product)
        return self.in_place.project(layer, group, x, product)

    def _project_beside(
        self, fork: Fork, layer: int, group: ModuleGroup, x: Tensor, product: Product
    ) -> Projected:
        num_rows = x.shape[0]
        values = fork.values(num_rows, group[-1].stop)
        with fork.stream.fork():
            out = product(is_beside=True)
        self.segments.shrink(layer, group, x)
        self.segments.expand_apart(layer, group, values)
        fork.stream.join()
        return Projected(out, Delta(values, self._has_adapter[:num_rows], fork.overlaps))


def _row_segments(segments: tuple[Segment, ...], table: AdapterTable) -> list[RowSegment]:
    """Those with rows and with low-rank pairs, by their adapters' places in the table."""
    found = []
    for segment in segments:
        entry = table.entry(segment.adapter_id)
        if segment.start < segment.stop and entry.max_rank:
            found.append(RowSegment(entry.index, entry.max_rank, segment.start, segment.stop))
    return found
