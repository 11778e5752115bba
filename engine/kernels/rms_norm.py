"""RMS norm of each row, with or without adding to the residual stream first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import launch
from engine.kernels.whole_numbers import next_power_of_2
from engine.lora.delta import Delta


def rms_norm(x: Tensor, weight: Tensor, eps: float, overlaps: bool) -> Tensor:
    """``weight · round(x / sqrt(mean(x²) + eps))`` of each row, a new tensor.

    ``x`` is ``[num_rows, width]``, rows may lie apart; ``weight`` ``[width]``; fp32, fp16 or bf16,
    all of one dtype. The mean is fp32; ``round`` is to that dtype, before the weight comes in.
    ``overlaps``: see ``engine.kernels.overlap``.

    Source: ``LlamaRMSNorm`` of transformers.
    """
    return _launch(x, None, weight, eps, overlaps, None)


def add_rms_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    overlaps: bool,
    delta: Delta | None = None,
) -> Tensor:
    """``residual += x``, rounded to its dtype, in place; then ``rms_norm`` of the sum.

    ``residual`` is ``[num_rows, width]``, contiguous, of the shape and dtype of ``x``. With
    ``delta``, ``x`` counts as with it added; it stays as it is.
    """
    assert residual.shape == x.shape and residual.is_contiguous(), residual.stride()
    assert residual.dtype == x.dtype, (residual.dtype, x.dtype)
    return _launch(x, residual, weight, eps, overlaps, delta)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    overlaps: bool,
    delta: Delta | None,
) -> Tensor:
    num_rows, width = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous(), x.stride()
    assert weight.shape == (width,) and weight.dtype == x.dtype, (weight.shape, weight.dtype)
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    if delta is not None:
        delta.check(num_rows, width)
        overlaps = overlaps and delta.overlaps
    tile = next_power_of_2(width)
    launch(
        _rms_norm_kernel,
        (num_rows,),
        out,
        x,
        residual,
        delta and delta.values,
        delta and delta.has_adapter,
        weight,
        x.stride(0),
        eps,
        WIDTH=width,
        TILE=tile,
        HAS_RESIDUAL=residual is not None,
        HAS_DELTA=delta is not None,
        OVERLAPS=overlaps,
        # 16 values a thread: two loads of 16 bytes in half precision.
        num_warps=min(16, max(1, tile // 512)),
        launch_pdl=overlaps,
    )
    return out


@triton.jit(do_not_specialize=["eps"])
def _rms_norm_kernel(
    out_ptr,
    x_ptr,
    residual_ptr,
    delta_ptr,
    has_adapter_ptr,
    weight_ptr,
    x_stride,
    eps,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    mask = columns < WIDTH
    dtype = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if HAS_DELTA:
        is_delta = columns < tl.where(tl.load(has_adapter_ptr + row) != 0, WIDTH, 0)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * WIDTH + columns, mask=is_delta, other=0.0)
        x = (x + delta).to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * WIDTH + columns
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(residual_ptrs, rounded, mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    normed = (x * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, (normed * weight.to(tl.float32)).to(dtype), mask)
