"""Adapters that a step only reads: the launches of a real one, in the places of a real one."""

from typing import Literal

import torch
from torch import Tensor

from engine.device import Device
from engine.lora.delta import Projected
from engine.lora.graph_variant import GraphVariant
from engine.lora.kernels.shapes import Weights
from engine.lora.launches import LoraLaunches, LoraTuning, ModuleGroup
from engine.lora.linear import LoraStep, Product
from engine.lora.pool import AdapterPool
from engine.lora.segments import Segment
from engine.lora.table import AdapterTable
from engine.lora.triton_linear import Fork, GraphStep, weights_in
from ipc.base_model import BaseModel
from tools.adapter_reads.kernel import max_programs, read_few

# How many launches a fused projection has: its A's and its B's in one each, or all in one.
NumLaunches = Literal[1, 2]


class ReadLora:
    """Graph steps that read what ``TritonLora``'s read of the adapters, and leave rows alone.

    The steps are its own, forks and joins included, with other launches; the deltas, which nobody
    computes, are not handed on.
    """

    def __init__(
        self,
        base: BaseModel,
        pool: AdapterPool,
        table: AdapterTable,
        device: Device,
        max_rows: int,
        max_rank: int,
        tuning: LoraTuning,
        num_launches: NumLaunches,
    ) -> None:
        weights = weights_in(pool, table, base)
        max_small_rows = min(tuning.max_small_rows, max_rows)
        self._table = table
        self._device = device
        self._tuning = tuning
        self._launches = ReadLaunches(
            base, weights, max_rows, max_small_rows, max_rank, tuning, num_launches
        )
        self._fork = None
        if tuning.forks:
            self._fork = Fork(base, max_small_rows, device.torch_device, tuning)

    def graph_step(self, max_rows: int) -> "ReadStep":
        return ReadStep(
            GraphStep(self._launches, self._table, self._device, max_rows, self._tuning, self._fork)
        )

    def take_checksum(self) -> int:
        """The sum, modulo 2³², of all 32-bit words that were read since it was taken last.

        On the current stream, which must be the forward stream; waits for it.
        """
        return self._launches.take_checksum()


class ReadStep:
    """A graph step without its deltas."""

    def __init__(self, step: GraphStep) -> None:
        self._step = step

    @property
    def in_place(self) -> LoraStep:
        return self._step.in_place

    def fill(self, segments: tuple[Segment, ...]) -> GraphVariant:
        return self._step.fill(segments)

    def project(self, layer: int, group: ModuleGroup, x: Tensor, product: Product) -> Projected:
        return Projected(self._step.project(layer, group, x, product).out)


class ReadLaunches(LoraLaunches):
    """Reads in the places of ``shrink_few`` and ``expand_few``, or all in that of the former."""

    def __init__(
        self,
        base: BaseModel,
        weights: Weights,
        max_rows: int,
        max_small_rows: int,
        max_rank: int,
        tuning: LoraTuning,
        num_launches: NumLaunches,
    ) -> None:
        super().__init__(base, weights, max_rows, max_small_rows, max_rank, tuning)
        self._num_launches = num_launches
        self._checksums = torch.zeros(
            max_programs(tuning, self._num_processors),
            dtype=torch.int32,
            device=weights.arena.device,
        )

    def take_checksum(self) -> int:
        """See ``ReadLora``."""
        total = int(self._checksums.sum(dtype=torch.int64))
        self._checksums.zero_()
        return total % (1 << 32)

    def shrink_few(
        self,
        layer: int,
        group: ModuleGroup,
        x: Tensor,
        units: Tensor,
        max_rows: int,
    ) -> None:
        self._read(layer, group, units, True, reads_b=self._num_launches == 1)

    def expand_few(
        self,
        layer: int,
        group: ModuleGroup,
        out: Tensor,
        units: Tensor,
        max_rows: int,
        adds: bool,
    ) -> None:
        if self._num_launches == 2:
            self._read(layer, group, units, False, True)

    def _read(
        self,
        layer: int,
        group: ModuleGroup,
        units: Tensor,
        reads_a: bool,
        reads_b: bool,
    ) -> None:
        read_few(
            self._weights,
            units,
            self._checksums,
            self._shape(group),
            layer,
            self._num_processors,
            self._tuning,
            reads_a,
            reads_b,
            self._overlaps,
        )
