"""Launches of kernels that take each element of a row by itself: a tile of a row for a program."""

from typing import Any

from torch import Tensor

from engine.kernels.launch import launch
from engine.kernels.whole_numbers import cdiv
from engine.lora.delta import Delta

_TILE = 1024


def launch_row_tiles(
    kernel: Any,
    tensors: tuple[Tensor, Tensor],
    delta: Delta | None,
    num_rows: int,
    width: int,
    overlaps: bool,
    **constants: Any,
) -> None:
    """Launches ``kernel`` with a program for each tile of each row; nothing where no row is.

    The kernel takes ``tensors``, then the delta's two, then as constants the ``width`` of what it
    writes, the tile's and ``constants``. Program ``(row, i)`` has the columns from ``i * TILE`` on.
    ``overlaps``: see ``engine.kernels.overlap``.
    """
    if num_rows == 0:
        return
    overlaps = overlaps and (delta is None or delta.overlaps)
    launch(
        kernel,
        (num_rows, cdiv(width, _TILE)),
        *tensors,
        delta and delta.values,
        delta and delta.has_adapter,
        WIDTH=width,
        TILE=_TILE,
        **constants,
        OVERLAPS=overlaps,
        num_warps=4,
        launch_pdl=overlaps,
    )
