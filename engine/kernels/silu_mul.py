"""The activation between an MLP's projections."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.row_tiles import launch_row_tiles
from engine.lora.delta import Delta


def silu_mul(gate_up: Tensor, overlaps: bool, delta: Delta | None = None) -> Tensor:
    """``round(gate · sigmoid(gate)) · up``, a new tensor ``[num_rows, width]``.

    ``gate_up`` is ``[num_rows, 2 * width]``, contiguous, fp32, fp16 or bf16: a row's gate, then its
    up. Computed in fp32; ``round`` is to the dtype. With ``delta``, ``gate_up`` counts as with it
    added; it stays as it is. ``overlaps``: see ``engine.kernels.overlap``.
    """
    num_rows, both = gate_up.shape
    assert gate_up.is_contiguous() and both % 2 == 0, gate_up.shape
    width = both // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if delta is not None:
        delta.check(num_rows, both)
    launch_row_tiles(
        _silu_mul_kernel,
        (out, gate_up),
        delta,
        num_rows,
        width,
        overlaps,
        HAS_DELTA=delta is not None,
    )
    return out


@triton.jit
def _silu_mul_kernel(
    out_ptr,
    gate_up_ptr,
    delta_ptr,
    has_adapter_ptr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < WIDTH
    gate_ptrs = gate_up_ptr + row * (2 * WIDTH) + columns
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if HAS_DELTA:
        is_delta = columns < tl.where(tl.load(has_adapter_ptr + row) != 0, WIDTH, 0)
        delta_ptrs = delta_ptr + row * (2 * WIDTH) + columns
        gate_delta = tl.load(delta_ptrs, mask=is_delta, other=0.0)
        up_delta = tl.load(delta_ptrs + WIDTH, mask=is_delta, other=0.0)
        gate = (gate + gate_delta).to(dtype).to(tl.float32)
        up = (up + up_delta).to(dtype).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, (active * up).to(dtype), mask)
