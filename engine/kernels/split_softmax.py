"""The softmax of a context that is taken tile by tile, and by several programs at once.

Heads are held as their two halves, ``[rows, dims]`` each, as the rotary embedding pairs them.
"""

import triton
import triton.language as tl


@triton.jit
def load_halves(ptrs, mask, HALF_DIM: tl.constexpr):
    """Both halves of the heads at ``ptrs``, zeros where ``mask`` is not."""
    first = tl.load(ptrs, mask=mask, other=0.0)
    second = tl.load(ptrs + HALF_DIM, mask=mask, other=0.0)
    return first, second


@triton.jit
def store_halves(ptrs, first, second, mask, HALF_DIM: tl.constexpr):
    dtype = ptrs.dtype.element_ty
    tl.store(ptrs, first.to(dtype), mask)
    tl.store(ptrs + HALF_DIM, second.to(dtype), mask)


@triton.jit
def absorb(
    first_query,
    second_query,
    first_keys,
    second_keys,
    first_values,
    second_values,
    is_seen,
    maximum,
    total,
    first_mixed,
    second_mixed,
    scale,
    UPCAST: tl.constexpr,
):
    """The running softmax ``(maximum, total, mixed)`` of a row with a tile of tokens taken in."""
    if UPCAST:
        first_query, second_query = first_query.to(tl.float32), second_query.to(tl.float32)
        first_keys, second_keys = first_keys.to(tl.float32), second_keys.to(tl.float32)
        first_values, second_values = first_values.to(tl.float32), second_values.to(tl.float32)
    scores = tl.dot(first_query, tl.trans(first_keys), input_precision="ieee")
    scores = tl.dot(second_query, tl.trans(second_keys), scores, input_precision="ieee")
    scores = tl.where(is_seen[None, :], scores * scale, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, 1)
    weights = weights.to(first_values.dtype)
    first_mixed = tl.dot(
        weights, first_values, first_mixed * decay[:, None], input_precision="ieee"
    )
    second_mixed = tl.dot(
        weights, second_values, second_mixed * decay[:, None], input_precision="ieee"
    )
    return new_maximum, total, first_mixed, second_mixed


@triton.jit
def merge_splits(
    out_ptr,
    partials_ptr,
    maxima_ptr,
    sums_ptr,
    num_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
):
    """Writes ``Σ partial · 2^(maximum - m) / Σ sum · 2^(maximum - m)``, m the largest maximum.

    Other programs wrote what is read here: the loads must not be served by this one's L1 cache.
    """
    heads = tl.arange(0, TILE_GROUP)
    dims = tl.arange(0, TILE_DIM)
    is_head = heads < GROUP
    is_value = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    maximum = tl.full((TILE_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_GROUP,), tl.float32)
    mixed = tl.zeros((TILE_GROUP, TILE_DIM), tl.float32)
    for start in tl.range(0, num_splits, TILE_SPLITS, num_stages=3):
        splits = start + tl.arange(0, TILE_SPLITS)
        is_split = (splits < num_splits)[:, None]
        offsets = splits[:, None] * GROUP + heads[None, :]
        mask = is_split & is_head[None, :]
        maxima = tl.load(maxima_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        sums = tl.load(sums_ptr + offsets, mask=mask, other=1.0, cache_modifier=".cg")
        partials = tl.load(
            partials_ptr + offsets[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=is_split[:, :, None] & is_value[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        maxima = tl.where(is_split, maxima, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
        weights = tl.exp2(maxima - new_maximum[None, :])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights * sums, 0)
        mixed = mixed * decay[:, None] + tl.sum(weights[:, :, None] * partials, 0)
        maximum = new_maximum
    merged = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + heads[:, None] * HEAD_DIM + dims[None, :], merged, is_value)
