"""The residual stream's sum with a projection whose delta is still apart."""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.row_tiles import launch_row_tiles
from engine.lora.delta import Delta


def add_residual(residual: Tensor, x: Tensor, delta: Delta, overlaps: bool) -> None:
    """``residual += round(x + delta)``, rounded to its dtype, in place.

    ``residual`` and ``x`` are ``[num_rows, width]``, contiguous, fp32, fp16 or bf16, of one dtype.
    ``overlaps``: see ``engine.kernels.overlap``.
    """
    num_rows, width = x.shape
    assert residual.shape == x.shape and residual.dtype == x.dtype, (residual.shape, x.shape)
    assert residual.is_contiguous() and x.is_contiguous(), (residual.stride(), x.stride())
    delta.check(num_rows, width)
    launch_row_tiles(_add_residual_kernel, (residual, x), delta, num_rows, width, overlaps)


@triton.jit
def _add_residual_kernel(
    residual_ptr,
    x_ptr,
    delta_ptr,
    has_adapter_ptr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < WIDTH
    is_delta = columns < tl.where(tl.load(has_adapter_ptr + row) != 0, WIDTH, 0)
    offsets = row * WIDTH + columns
    dtype = residual_ptr.dtype.element_ty
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(delta_ptr + offsets, mask=is_delta, other=0.0)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    total = residual + x.to(dtype).to(tl.float32)
    tl.store(residual_ptr + offsets, total.to(dtype), mask)
