"""What adapters add to heads that a program holds as two halves, see ``engine.lora.delta``."""

import triton
import triton.language as tl


@triton.jit
def load_delta(ptrs, mask, HALF_DIM: tl.constexpr):
    """Both halves at ``ptrs`` where ``mask`` is, anything elsewhere: for ``add_delta``.

    So nothing waits for them before they are added.
    """
    return tl.load(ptrs, mask=mask), tl.load(ptrs + HALF_DIM, mask=mask)


@triton.jit
def add_delta(x, delta, mask):
    """``round(x + delta)`` where ``mask`` is, ``x`` elsewhere."""
    return (x.to(tl.float32) + tl.where(mask, delta, 0.0)).to(x.dtype)
