"""Small arrays out of pinned host memory, read by a kernel instead of a copy engine.

A copy engine takes one copy after another. While another process fills the bus with copies of
32 MiB, a step's few kilobytes would wait for the one before them: some 0.6 ms. What a kernel reads
shares the bus with a copy that is under way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.kernels.whole_numbers import cdiv

_TILE = 512


def read_host(source: Tensor, target: Tensor, head: int, width: int, pitch: int) -> None:
    """Copies ``source``, then rows of ``width`` words into rows that begin ``pitch`` words apart.

    Both are int32, one-dimensional and contiguous; ``source`` lies in pinned host memory, or where
    ``target`` does. The first ``head`` words stay as they lie; the rest are whole rows, the first
    of which begins behind them, in ``target`` too. What lies between rows is left as it is.
    """
    num_words = source.numel()
    assert source.dtype == target.dtype == torch.int32, (source.dtype, target.dtype)
    assert head <= num_words and width <= pitch, (head, num_words, width, pitch)
    num_rows = (num_words - head) // width
    assert num_rows * width == num_words - head, (num_words, head, width)
    if num_rows:
        assert head + (num_rows - 1) * pitch + width <= target.numel(), target.shape
    launch(
        _read_host_kernel,
        (cdiv(num_words, _TILE),),
        target,
        source,
        num_words,
        head,
        width,
        pitch,
        TILE=_TILE,
        num_warps=4,
    )


# Sizes and addresses differ from step to step: a specialized kernel would be compiled in a step.
@triton.jit(
    do_not_specialize=["num_words", "head", "width", "pitch"],
    do_not_specialize_on_alignment=["target_ptr", "source_ptr"],
)
def _read_host_kernel(
    target_ptr,
    source_ptr,
    num_words,
    head,
    width,
    pitch,
    TILE: tl.constexpr,
):
    words = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = words < num_words
    values = tl.load(source_ptr + words, mask=mask)
    behind = tl.maximum(words - head, 0)
    places = tl.where(words < head, words, head + behind // width * pitch + behind % width)
    tl.store(target_ptr + places, values, mask)
