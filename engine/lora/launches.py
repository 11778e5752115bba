"""Launches of the adapters' kernels, on the memory that one engine has for them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.lora.kernels.expand_few import ExpandFewTuning, expand_few
from engine.lora.kernels.expand_many import ExpandManyTuning, expand_many
from engine.lora.kernels.shapes import GroupShape, Scratch, Weights, group_shape
from engine.lora.kernels.shrink_few import ShrinkFewTuning, shrink_few
from engine.lora.kernels.shrink_many import ShrinkManyTuning, shrink_many
from engine.lora.linear import ModuleColumns
from engine.lora.work import UnitShape
from ipc.base_model import LINEAR_GROUPS, BaseModel
from ipc.image import padded_rank

ModuleGroup = tuple[ModuleColumns, ...]

# What Triton's interpreter, which runs programs one after another, passes for.
_NUM_PROCESSORS_OF_CPU = 4


@dataclass(frozen=True, slots=True)
class LoraTuning:
    """How the kernels cut up their work; nothing of it changes the result beyond rounding.

    Segments of at most ``max_few_rows`` rows are small, as long as no more than
    ``max_small_rows`` are in small segments; ``tile_few_rows`` of their rows are computed at once.
    ``overlaps`` lets a launch read weights while the launch before it still runs (programmatic
    dependent launch, from compute capability 9.0 on).

    ``forks``: graph steps launch on a stream of their own beside the base model's products, and
    leave the delta to the launch behind. ``tools.bench_decode_adapters`` compares the ways.
    """

    max_few_rows: int = 32
    max_small_rows: int = 512
    tile_few_rows: int = 16
    overlaps: bool = True
    forks: bool = True
    shrink_few: ShrinkFewTuning = field(default_factory=ShrinkFewTuning)
    expand_few: ExpandFewTuning = field(default_factory=ExpandFewTuning)
    shrink_many: ShrinkManyTuning = field(default_factory=ShrinkManyTuning)
    expand_many: ExpandManyTuning = field(default_factory=ExpandManyTuning)

    def unit_shape(self) -> UnitShape:
        return UnitShape(
            self.tile_few_rows,
            self.shrink_few.row_ranks,
            self.shrink_few.rows_ranks,
            self.expand_few.ranks,
            self.expand_few.columns,
        )


class LoraLaunches:
    """Owns the kernels' scratch memory, so all launches go to one stream: the current one.

    ``max_rows`` bounds the rows of a step, ``max_small_rows`` those in small segments.
    """

    def __init__(
        self,
        base: BaseModel,
        weights: Weights,
        max_rows: int,
        max_small_rows: int,
        max_rank: int,
        tuning: LoraTuning,
    ) -> None:
        assert max_rank <= tuning.expand_few.ranks[-1], max_rank
        device = weights.arena.device
        self._base = base
        self._weights = weights
        self._tuning = tuning
        self.max_rank = padded_rank(max_rank)
        self._num_processors = _NUM_PROCESSORS_OF_CPU
        self._overlaps = False
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._num_processors = properties.multi_processor_count
            self._overlaps = tuning.overlaps and properties.major >= 9
        shrink = tuning.shrink_few
        num_splits = max(shrink.cut_row(shape.in_features)[0] for shape in base.linears)
        num_programs = shrink.programs_per_processor * self._num_processors
        longest = max(len(group) for group in LINEAR_GROUPS)
        max_tiles = tuning.unit_shape().max_units(max_small_rows) * longest
        self._scratch = Scratch(
            max_rows,
            num_splits * max_small_rows,
            num_programs * tuning.tile_few_rows * shrink.rows_ranks,
            max(max_tiles, self._num_processors),
            max_rank,
            weights.arena.dtype,
            device,
        )
        self._groups: dict[ModuleGroup, GroupShape] = {}

    def shrink_few(
        self,
        layer: int,
        group: ModuleGroup,
        x: Tensor,
        units: Tensor,
        max_rows: int,
    ) -> None:
        """``x Aᵀ`` for the small segments in ``units``, which have ``max_rows`` rows at most."""
        shrink_few(
            x,
            self._weights,
            self._scratch,
            units,
            self._shape(group),
            layer,
            max_rows,
            self._tuning.tile_few_rows,
            self._num_processors,
            self._tuning.shrink_few,
            self._overlaps,
        )

    def expand_few(
        self,
        layer: int,
        group: ModuleGroup,
        out: Tensor,
        units: Tensor,
        max_rows: int,
        adds: bool,
    ) -> None:
        """Changes ``out`` as the adapters do that ``shrink_few`` was last launched for.

        Unless it ``adds``, ``out`` is fp32 and gets what they would add; none has row scales.
        """
        shape = self._shape(group)
        expand_few(
            out,
            self._weights,
            self._scratch,
            units,
            shape,
            layer,
            self._tuning.shrink_few.cut_row(shape.in_features)[0],
            max_rows,
            self._tuning.tile_few_rows,
            self._num_processors,
            self._tuning.expand_few,
            self._overlaps,
            adds,
        )

    def shrink_many(
        self,
        layer: int,
        group: ModuleGroup,
        x: Tensor,
        tiles: Tensor,
        max_rank: int,
        num_used: int,
    ) -> None:
        """``x Aᵀ`` for the large segments' ``tiles``, whose ranks are ``max_rank`` at most.

        About ``num_used`` of them have rows.
        """
        shrink_many(
            x,
            self._weights,
            self._scratch,
            tiles,
            self._shape(group),
            layer,
            max_rank,
            num_used,
            self._num_processors,
            self._tuning.shrink_many,
        )

    def expand_many(
        self, layer: int, group: ModuleGroup, out: Tensor, tiles: Tensor, max_rank: int
    ) -> None:
        """Changes ``out`` as the adapters do that ``shrink_many`` was last launched for."""
        expand_many(
            out,
            self._weights,
            self._scratch,
            tiles,
            self._tuning.shrink_many.tile_rows,
            self._shape(group),
            layer,
            max_rank,
            self._tuning.expand_many,
        )

    def warm_up(self) -> None:
        """Compiles what ``shrink_many`` and ``expand_many`` can need, so that no step waits for it.

        No adapter must be resident yet: the launches find nothing to do.
        """
        device, dtype = self._weights.arena.device, self._weights.arena.dtype
        ranks = [rank for rank in (8, 16, 32, 64, 128) if rank < self.max_rank]
        for names in LINEAR_GROUPS:
            group = group_columns(self._base, names)
            x = torch.zeros(1, self._shape(group).in_features, dtype=dtype, device=device)
            out = torch.zeros(1, group[-1].stop, dtype=dtype, device=device)
            # As few and as many tiles as make a difference to how the work is cut up.
            for num_tiles in (1, self._num_processors):
                tiles = torch.tensor([[0, 0, 1, 0]] * num_tiles, dtype=torch.int32, device=device)
                for rank in (*ranks, self.max_rank):
                    self.shrink_many(0, group, x, tiles, rank, num_tiles)
                    self.expand_many(0, group, out, tiles, rank)

    def _shape(self, group: ModuleGroup) -> GroupShape:
        shape = self._groups.get(group)
        if shape is None:
            shape = self._groups[group] = group_shape(self._base, group)
        return shape


def group_columns(base: BaseModel, names: tuple[str, ...]) -> ModuleGroup:
    """The columns of a projection that fuses these linears."""
    columns: list[ModuleColumns] = []
    for name in names:
        start = columns[-1].stop if columns else 0
        columns.append(ModuleColumns(name, start, start + base.linear(name).out_features))
    return tuple(columns)


class SmallSegments:
    """Segments of few rows: their list of work on the device, ``max_rows`` rows at most."""

    def __init__(self, launches: LoraLaunches, units: Tensor, max_rows: int) -> None:
        self._launches = launches
        self._units = units
        self._max_rows = max_rows

    def shrink(self, layer: int, group: ModuleGroup, x: Tensor) -> None:
        self._launches.shrink_few(layer, group, x, self._units, self._max_rows)

    def expand(self, layer: int, group: ModuleGroup, out: Tensor) -> None:
        """Changes ``out`` by what comes of the ``shrink`` that was launched last."""
        self._launches.expand_few(layer, group, out, self._units, self._max_rows, adds=True)

    def expand_apart(self, layer: int, group: ModuleGroup, values: Tensor) -> None:
        """Puts what they add into ``values`` ``[num_rows, out]`` fp32, in every column of theirs.

        No adapter of these segments has row scales.
        """
        self._launches.expand_few(layer, group, values, self._units, self._max_rows, adds=False)


class LargeSegments:
    """Segments of many rows: their tiles on the device, of ranks up to ``max_rank``.

    About ``num_used`` of the tiles have rows.
    """

    def __init__(self, launches: LoraLaunches, tiles: Tensor, max_rank: int, num_used: int) -> None:
        self._launches = launches
        self._tiles = tiles
        self._max_rank = max_rank
        self._num_used = num_used

    def shrink(self, layer: int, group: ModuleGroup, x: Tensor) -> None:
        self._launches.shrink_many(layer, group, x, self._tiles, self._max_rank, self._num_used)

    def expand(self, layer: int, group: ModuleGroup, out: Tensor) -> None:
        """Changes ``out`` by what comes of the ``shrink`` that was launched last."""
        self._launches.expand_many(layer, group, out, self._tiles, self._max_rank)
