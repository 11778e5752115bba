"""What stands between the QKV projection and attention: head norms, rotation, the cache's write."""

import triton
import triton.language as tl
from torch import Tensor

# Query heads of one program.
_TILE_HEADS = 16


def rope_kv(
    qkv: Tensor,
    rotation: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> None:
    """Rotates queries and keys of ``qkv`` in place; stores keys and values of token t at slots[t].

    A head ``(a, b)`` of two halves becomes ``(a · cos - b · sin, b · cos + a · sin)``. Before that
    it gets the RMS norm of ``norms`` (the queries' weight, the keys'; each ``[head_dim]``), if any.
    A negative slot stores nothing: rows that only fill up a batch have one.

    | tensor           | shape, contiguous                                      | dtype          |
    |------------------|--------------------------------------------------------|----------------|
    | `qkv`            | `[num_tokens, (num_heads + 2 num_kv_heads) * head_dim]`| the model's    |
    | `rotation`       | `[num_tokens, 2, head_dim / 2]`: cosines, sines        | fp32           |
    | `keys`, `values` | `[num_slots, num_kv_heads, head_dim]`                  | the model's    |
    | `slots`          | `[num_tokens]`                                         | int32 or int64 |

    Cosines, sines, products and sums are rounded to the model's dtype one by one; norms as in
    ``rms_norm``. Mutates ``qkv``, ``keys`` and ``values``.

    Source: ``apply_rotary_pos_emb`` and ``Qwen3RMSNorm`` of transformers.
    """
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = keys.shape[1:]
    num_heads = width // head_dim - 2 * num_kv_heads
    assert qkv.is_contiguous() and width % head_dim == 0 and num_heads > 0, qkv.shape
    assert head_dim % 2 == 0 and rotation.shape == (num_tokens, 2, head_dim // 2), rotation.shape
    assert rotation.is_contiguous() and slots.is_contiguous() and slots.shape == (num_tokens,)
    assert keys.shape == values.shape and keys.is_contiguous() and values.is_contiguous()
    assert qkv.dtype == keys.dtype == values.dtype, (qkv.dtype, keys.dtype)
    query_norm, key_norm = norms or (None, None)
    for norm in norms or ():
        assert norm.shape == (head_dim,) and norm.is_contiguous() and norm.dtype == qkv.dtype
    if num_tokens == 0:
        return
    tile_heads = min(_TILE_HEADS, triton.next_power_of_2(num_heads))
    num_query_parts = triton.cdiv(num_heads, tile_heads)
    _rope_kv_kernel[(num_tokens, num_query_parts + 1)](
        qkv,
        rotation,
        query_norm,
        key_norm,
        eps,
        keys,
        values,
        slots,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        HAS_NORMS=norms is not None,
        TILE_HEADS=tile_heads,
        TILE_KV_HEADS=triton.next_power_of_2(num_kv_heads),
        TILE_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["eps"])
def _rope_kv_kernel(
    qkv_ptr,
    rotation_ptr,
    query_norm_ptr,
    key_norm_ptr,
    eps,
    keys_ptr,
    values_ptr,
    slots_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_KV_HEADS: tl.constexpr,
    TILE_HALF: tl.constexpr,
):
    """One token: some of its query heads, or as the last part all of its keys and values."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, TILE_HALF)
    qkv_ptr += token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * 2 * HALF_DIM)
    rotation_ptr += token * (2 * HALF_DIM)
    cosine = tl.load(rotation_ptr + dims, mask=dims < HALF_DIM, other=0.0)
    sine = tl.load(rotation_ptr + HALF_DIM + dims, mask=dims < HALF_DIM, other=0.0)
    if part < tl.num_programs(1) - 1:
        query_heads = part * TILE_HEADS + tl.arange(0, TILE_HEADS)
        query_mask = (query_heads < NUM_HEADS)[:, None] & (dims < HALF_DIM)[None, :]
        query_ptrs = qkv_ptr + query_heads[:, None] * (2 * HALF_DIM) + dims[None, :]
        _rotate(
            query_ptrs, query_mask, query_norm_ptr, eps, cosine, sine, dims, HALF_DIM, HAS_NORMS
        )
    else:
        heads = tl.arange(0, TILE_KV_HEADS)
        mask = (heads < NUM_KV_HEADS)[:, None] & (dims < HALF_DIM)[None, :]
        offsets = heads[:, None] * (2 * HALF_DIM) + dims[None, :]
        key_ptrs = qkv_ptr + NUM_HEADS * (2 * HALF_DIM) + offsets
        value_ptrs = key_ptrs + NUM_KV_HEADS * (2 * HALF_DIM)
        first, second = _rotate(
            key_ptrs, mask, key_norm_ptr, eps, cosine, sine, dims, HALF_DIM, HAS_NORMS
        )
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            stored = slot * (NUM_KV_HEADS * 2 * HALF_DIM) + offsets
            tl.store(keys_ptr + stored, first, mask)
            tl.store(keys_ptr + stored + HALF_DIM, second, mask)
            first_values = tl.load(value_ptrs, mask=mask)
            second_values = tl.load(value_ptrs + HALF_DIM, mask=mask)
            tl.store(values_ptr + stored, first_values, mask)
            tl.store(values_ptr + stored + HALF_DIM, second_values, mask)


@triton.jit
def _rotate(
    ptrs,
    mask,
    norm_ptr,
    eps,
    cosine,
    sine,
    dims,
    HALF_DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Norms and turns the heads at ``ptrs`` in place, and returns their two halves."""
    dtype = ptrs.dtype.element_ty
    first = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptrs + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
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
    tl.store(ptrs, turned_first, mask)
    tl.store(ptrs + HALF_DIM, turned_second, mask)
    return turned_first, turned_second


@triton.jit
def _round(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)
