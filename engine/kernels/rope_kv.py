"""What stands between the QKV projection and attention: head norms, rotation, the cache's write."""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.head_rotation import HeadRotation, turn_heads
from engine.kernels.launch import launch
from engine.kernels.whole_numbers import cdiv, next_power_of_2

# Query heads of one program.
_TILE_HEADS = 16


def rope_kv(
    qkv: Tensor, rotation: HeadRotation, keys: Tensor, values: Tensor, overlaps: bool
) -> None:
    """Rotates queries and keys of ``qkv`` in place; stores keys and values at their slots.

    | tensor           | shape, contiguous                                      | dtype          |
    |------------------|--------------------------------------------------------|----------------|
    | `qkv`            | `[num_tokens, (num_heads + 2 num_kv_heads) * head_dim]`| the model's    |
    | `keys`, `values` | `[num_slots, num_kv_heads, head_dim]`                  | the model's    |

    ``rotation`` has a row for each token. Mutates ``qkv``, ``keys`` and ``values``. ``overlaps``:
    see ``engine.kernels.overlap``.
    """
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = keys.shape[1:]
    num_heads = width // head_dim - 2 * num_kv_heads
    assert qkv.is_contiguous() and width % head_dim == 0 and num_heads > 0, qkv.shape
    assert keys.shape == values.shape and keys.is_contiguous() and values.is_contiguous()
    assert qkv.dtype == keys.dtype == values.dtype, (qkv.dtype, keys.dtype)
    rotation.check(num_tokens, keys)
    query_norm, key_norm = rotation.norms or (None, None)
    if num_tokens == 0:
        return
    tile_heads = min(_TILE_HEADS, next_power_of_2(num_heads))
    num_query_parts = cdiv(num_heads, tile_heads)
    launch(
        _rope_kv_kernel,
        (num_tokens, num_query_parts + 1),
        qkv,
        rotation.rotation,
        query_norm,
        key_norm,
        rotation.eps,
        keys,
        values,
        rotation.slots,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        HAS_NORMS=rotation.norms is not None,
        TILE_HEADS=tile_heads,
        TILE_KV_HEADS=next_power_of_2(num_kv_heads),
        TILE_HALF=next_power_of_2(head_dim // 2),
        OVERLAPS=overlaps,
        num_warps=4,
        launch_pdl=overlaps,
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
    OVERLAPS: tl.constexpr,
):
    """One token: some of its query heads, or as the last part all of its keys and values."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
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
        first_query = tl.load(query_ptrs, mask=query_mask, other=0.0)
        second_query = tl.load(query_ptrs + HALF_DIM, mask=query_mask, other=0.0)
        # fmt: off
        first_query, second_query = turn_heads(
            first_query, second_query, query_norm_ptr, eps, cosine, sine, dims, HALF_DIM, HAS_NORMS
        )
        # fmt: on
        tl.store(query_ptrs, first_query, query_mask)
        tl.store(query_ptrs + HALF_DIM, second_query, query_mask)
    else:
        # All loads come before the first store: none has to wait for it.
        slot = tl.load(slots_ptr + token).to(tl.int64)
        heads = tl.arange(0, TILE_KV_HEADS)
        mask = (heads < NUM_KV_HEADS)[:, None] & (dims < HALF_DIM)[None, :]
        offsets = heads[:, None] * (2 * HALF_DIM) + dims[None, :]
        key_ptrs = qkv_ptr + NUM_HEADS * (2 * HALF_DIM) + offsets
        value_ptrs = key_ptrs + NUM_KV_HEADS * (2 * HALF_DIM)
        first_key = tl.load(key_ptrs, mask=mask, other=0.0)
        second_key = tl.load(key_ptrs + HALF_DIM, mask=mask, other=0.0)
        first_value = tl.load(value_ptrs, mask=mask)
        second_value = tl.load(value_ptrs + HALF_DIM, mask=mask)
        first_key, second_key = turn_heads(
            first_key, second_key, key_norm_ptr, eps, cosine, sine, dims, HALF_DIM, HAS_NORMS
        )
        tl.store(key_ptrs, first_key, mask)
        tl.store(key_ptrs + HALF_DIM, second_key, mask)
        if slot >= 0:
            stored = slot * (NUM_KV_HEADS * 2 * HALF_DIM) + offsets
            tl.store(keys_ptr + stored, first_key, mask)
            tl.store(keys_ptr + stored + HALF_DIM, second_key, mask)
            tl.store(values_ptr + stored, first_value, mask)
            tl.store(values_ptr + stored + HALF_DIM, second_value, mask)
