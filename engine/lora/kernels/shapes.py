"""What a launch of the adapters' kernels is for, and the memory that it works in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.lora.linear import ModuleColumns
from ipc.base_model import LINEAR_GROUPS, LINEAR_MODULES, BaseModel


@dataclass(frozen=True, slots=True)
class GroupShape:
    """The linears of one fused projection: ``out`` is ``[num_rows, out_features]``.

    Linear ``i`` is the ``first_module + i``-th of a layer, and has the columns
    ``[starts[i], starts[i] + widths[i])`` of ``out``. Both are filled up to three with zeros.
    """

    first_module: int
    num_modules: int
    in_features: int
    starts: tuple[int, int, int]
    widths: tuple[int, int, int]

    def column_blocks(self, width: int) -> tuple[int, int, int]:
        """For each linear, how many blocks of ``width`` columns stand before the end of its own."""
        first, second, third = (-(-each // width) for each in self.widths)
        return first, first + second, first + second + third


def group_shape(base: BaseModel, group: tuple[ModuleColumns, ...]) -> GroupShape:
    """The shape of ``group``, which is one of ``LINEAR_GROUPS``, or begins like one."""
    names = tuple(columns.module for columns in group)
    assert any(each[: len(names)] == names for each in LINEAR_GROUPS), names
    starts = [columns.start for columns in group]
    widths = [columns.stop - columns.start for columns in group]
    padding = [0] * (3 - len(group))
    first_start, second_start, third_start = starts + padding
    first_width, second_width, third_width = widths + padding
    return GroupShape(
        LINEAR_MODULES.index(names[0]),
        len(names),
        base.linear(names[0]).in_features,
        (first_start, second_start, third_start),
        (first_width, second_width, third_width),
    )


@dataclass(frozen=True, slots=True)
class Weights:
    """The pool's arena ``[num_elements]`` in the model's dtype, and the table of what lies in it.

    ``row_scales`` is the same memory as fp32. ``offsets``, ``ranks`` and ``scalings`` are the
    table's records as int64, int32 and fp32: ``[max_adapters, num_layers, num_linears, words]``.
    """

    arena: Tensor
    row_scales: Tensor
    offsets: Tensor
    ranks: Tensor
    scalings: Tensor


class Scratch:
    """Owns what shrink leaves for expand, for the launches of one stream.

    | tensor     | shape                           | dtype       | holds                          |
    |------------|---------------------------------|-------------|--------------------------------|
    | `partial`  | flat, see below                 | fp32        | sums over a part of the inputs |
    | `shrunk`   | `[max_rows, columns]`           | the model's | sums over all of them          |
    | `arrivals` | `[max_tiles]`                   | int32       | zeros between launches         |

    Column ``c`` is the ``c``-th row of the group's A's. Segments of one row have their sums in
    ``partial`` alone, ``[max_partials, columns]`` altogether; others end up in ``shrunk``, with
    ``part_values`` on the way.
    """

    def __init__(
        self,
        max_rows: int,
        max_partials: int,
        part_values: int,
        max_tiles: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        longest = max(len(group) for group in LINEAR_GROUPS)
        self.columns = -(-longest * max_rank // 16) * 16
        self.partial = torch.empty(max_partials * self.columns + part_values, device=device)
        self.shrunk = torch.empty(max_rows, self.columns, dtype=dtype, device=device)
        self.arrivals = torch.zeros(max_tiles, dtype=torch.int32, device=device)
