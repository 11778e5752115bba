"""Head norm and rotary embedding of heads that a program holds as two halves."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadRotation:
    """What turns a projection's output into heads, and where keys and values are to be stored.

    A head ``(a, b)`` of two halves becomes ``(a · cos - b · sin, b · cos + a · sin)``. Before that
    it gets the RMS norm of ``norms`` (the queries' weight, the keys'; each ``[head_dim]``), if any.

    | tensor     | shape, contiguous                               | dtype          |
    |------------|-------------------------------------------------|----------------|
    | `rotation` | `[num_rows, 2, head_dim / 2]`: cosines, sines   | fp32           |
    | `slots`    | `[num_rows]`; a negative one: stored nowhere    | int32 or int64 |

    Cosines, sines, products and sums are rounded to the model's dtype one by one; norms as in
    ``rms_norm``.

    Source: ``apply_rotary_pos_emb`` and ``Qwen3RMSNorm`` of transformers.
    """

    rotation: Tensor
    norms: tuple[Tensor, Tensor] | None
    eps: float
    slots: Tensor

    def check(self, num_rows: int, heads: Tensor) -> None:
        """Asserts that it is for ``num_rows`` rows of ``heads`` ``[..., head_dim]``."""
        head_dim = heads.shape[-1]
        assert head_dim % 2 == 0, head_dim
        assert self.rotation.shape == (num_rows, 2, head_dim // 2), self.rotation.shape
        assert self.rotation.is_contiguous() and self.slots.is_contiguous()
        assert self.slots.shape == (num_rows,), self.slots.shape
        for norm in self.norms or ():
            assert norm.shape == (head_dim,) and norm.is_contiguous() and norm.dtype == heads.dtype


@triton.jit
def turn_heads(
    first,
    second,
    norm_ptr,
    eps,
    cosine,
    sine,
    dims,
    HALF_DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Norms and turns heads, given as their halves ``[heads, dims]`` and of that dtype returned.

    Zeros in ``dims`` beyond ``HALF_DIM`` stay zeros. ``cosine`` and ``sine`` are ``[dims]`` fp32.
    """
    dtype: tl.constexpr = first.dtype
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    if HAS_NORMS:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF_DIM) + eps)[:, None]
        is_dim = dims < HALF_DIM
        first_weight = tl.load(norm_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
        second_weight = tl.load(norm_ptr + HALF_DIM + dims, mask=is_dim, other=0.0).to(tl.float32)
        first = _round(_round(first * scale, dtype) * first_weight[None, :], dtype)
        second = _round(_round(second * scale, dtype) * second_weight[None, :], dtype)
    cosine = _round(cosine, dtype)[None, :]
    sine = _round(sine, dtype)[None, :]
    turned_first = (_round(first * cosine, dtype) - _round(second * sine, dtype)).to(dtype)
    turned_second = (_round(second * cosine, dtype) + _round(first * sine, dtype)).to(dtype)
    return turned_first, turned_second


@triton.jit
def _round(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)
