"""What one program of a paged decode does: a split of a sequence, and the merge if it is the last.

Flash decoding: a context is split over several programs, so that a few long sequences fill the
GPU. Each leaves its partial softmax in the workspace, and the last one to arrive for a sequence
and KV head merges them.

The new token's own key and value come from the step's tensors and never from the cache: so the same
launch may compute and store them.
"""

import triton
import triton.language as tl

from engine.kernels.head_deltas import add_delta, load_delta
from engine.kernels.head_rotation import turn_heads
from engine.kernels.prefetch import LINE_BYTES, prefetch_lines
from engine.kernels.split_softmax import absorb, load_halves, merge_splits, store_halves


@triton.jit(do_not_specialize=["table_stride", "eps"])
def paged_decode_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    context_lens_ptr,
    rows_ptr,
    rotation_ptr,
    query_norm_ptr,
    key_norm_ptr,
    slots_ptr,
    delta_ptr,
    has_adapter_ptr,
    partials_ptr,
    maxima_ptr,
    sums_ptr,
    arrivals_ptr,
    query_stride,
    key_stride,
    value_stride,
    table_stride,
    eps,
    scale,
    min_split_tokens,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    ROTATES: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    PREFETCHED_TOKENS: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One split of one sequence for the ``GROUP`` query heads that share a KV head.

    Splits divide the cached tokens; the new token belongs to the first.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    HEAD_DIM: tl.constexpr = 2 * HALF_DIM
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    context = tl.load(context_lens_ptr + sequence).to(tl.int32)
    row = sequence.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + sequence).to(tl.int64)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride

    cached = context - 1
    split_tokens = tl.cdiv(tl.cdiv(cached, tl.num_programs(1)), TILE_TOKENS) * TILE_TOKENS
    split_tokens = tl.maximum(split_tokens, min_split_tokens)
    num_active = tl.maximum(tl.cdiv(cached, split_tokens), (context > 0).to(tl.int32))

    heads = tl.arange(0, TILE_HEADS)
    dims = tl.arange(0, TILE_HALF)
    is_dim = (dims < HALF_DIM)[None, :]
    is_query = (heads < GROUP)[:, None] & is_dim
    query_offsets = heads[:, None] * HEAD_DIM + dims[None, :]
    out_ptrs = out_ptr + (row * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM) + query_offsets
    if split >= num_active:
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        if (context == 0) & (split == 0):
            zeros = tl.zeros((TILE_HEADS, TILE_HALF), tl.float32)
            store_halves(out_ptrs, zeros, zeros, is_query, HALF_DIM)
        return

    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, cached)
    keys_ptr += kv_head * HEAD_DIM
    values_ptr += kv_head * HEAD_DIM
    if HAS_DELTA:
        has_adapter = tl.load(has_adapter_ptr + row) != 0
    if OVERLAPS:
        if PREFETCHED_TOKENS > 0:
            _prefetch_tokens(
                keys_ptr,
                values_ptr,
                table_ptr,
                begin,
                end,
                NUM_KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                PREFETCHED_TOKENS,
            )
        tl.extra.cuda.gdc_wait()

    query_ptrs = query_ptr + row * query_stride + kv_head * (GROUP * HEAD_DIM) + query_offsets
    first_query = tl.load(query_ptrs, mask=is_query)
    second_query = tl.load(query_ptrs + HALF_DIM, mask=is_query)
    # The new token is the first split's alone: for the others its key and value are zeros.
    is_own = split == 0
    is_new = (dims < tl.where(is_own, HALF_DIM, 0))[None, :]
    key_ptrs = key_ptr + row * key_stride + kv_head * HEAD_DIM + dims[None, :]
    value_ptrs = value_ptr + row * value_stride + kv_head * HEAD_DIM + dims[None, :]
    first_key = tl.load(key_ptrs, mask=is_new)
    second_key = tl.load(key_ptrs + HALF_DIM, mask=is_new)
    first_value = tl.load(value_ptrs, mask=is_new)
    second_value = tl.load(value_ptrs + HALF_DIM, mask=is_new)
    if HAS_DELTA:
        delta_ptr += row * ((GROUP + 2) * NUM_KV_HEADS * HEAD_DIM)
        key_delta_ptr = delta_ptr + (GROUP * NUM_KV_HEADS + kv_head) * HEAD_DIM
        value_delta_ptr = key_delta_ptr + NUM_KV_HEADS * HEAD_DIM
        is_query_delta = (heads < tl.where(has_adapter, GROUP, 0))[:, None] & is_dim
        is_new_delta = (dims < tl.where(is_own & has_adapter, HALF_DIM, 0))[None, :]
        # fmt: off
        first_query_delta, second_query_delta = load_delta(
            delta_ptr + kv_head * (GROUP * HEAD_DIM) + query_offsets, is_query_delta, HALF_DIM
        )
        first_key_delta, second_key_delta = load_delta(
            key_delta_ptr + dims[None, :], is_new_delta, HALF_DIM
        )
        first_value_delta, second_value_delta = load_delta(
            value_delta_ptr + dims[None, :], is_new_delta, HALF_DIM
        )
        # fmt: on
    if ROTATES:
        rotation_ptr += row * HEAD_DIM
        cosine = tl.load(rotation_ptr + dims, mask=dims < HALF_DIM, other=0.0)
        sine = tl.load(rotation_ptr + HALF_DIM + dims, mask=dims < HALF_DIM, other=0.0)
        slot = tl.load(slots_ptr + row).to(tl.int64)
    first_query = tl.where(is_query, first_query, 0.0)
    second_query = tl.where(is_query, second_query, 0.0)
    first_key = tl.where(is_new, first_key, 0.0)
    second_key = tl.where(is_new, second_key, 0.0)
    first_value = tl.where(is_new, first_value, 0.0)
    second_value = tl.where(is_new, second_value, 0.0)
    if HAS_DELTA:
        first_query = add_delta(first_query, first_query_delta, is_query_delta)
        second_query = add_delta(second_query, second_query_delta, is_query_delta)
        first_key = add_delta(first_key, first_key_delta, is_new_delta)
        second_key = add_delta(second_key, second_key_delta, is_new_delta)
        first_value = add_delta(first_value, first_value_delta, is_new_delta)
        second_value = add_delta(second_value, second_value_delta, is_new_delta)
    if ROTATES:
        # fmt: off
        first_query, second_query = turn_heads(
            first_query, second_query, query_norm_ptr, eps, cosine, sine, dims, HALF_DIM, HAS_NORMS
        )
        first_key, second_key = turn_heads(
            first_key, second_key, key_norm_ptr, eps, cosine, sine, dims, HALF_DIM, HAS_NORMS
        )
        # fmt: on
        if is_own & (slot >= 0):
            stored = slot * (NUM_KV_HEADS * HEAD_DIM) + dims[None, :]
            store_halves(keys_ptr + stored, first_key, second_key, is_dim, HALF_DIM)
            store_halves(values_ptr + stored, first_value, second_value, is_dim, HALF_DIM)

    products = first_query.to(tl.float32) * first_key.to(tl.float32)
    products += second_query.to(tl.float32) * second_key.to(tl.float32)
    maximum = tl.where(is_own, tl.sum(products, 1) * scale, float("-inf"))
    total = tl.where(is_own, tl.full((TILE_HEADS,), 1.0, tl.float32), 0.0)
    zeros = tl.zeros((TILE_HEADS, TILE_HALF), tl.float32)
    first_mixed = zeros + first_value.to(tl.float32)
    second_mixed = zeros + second_value.to(tl.float32)
    # fmt: off
    for start in tl.range(begin, end, TILE_TOKENS, num_stages=NUM_STAGES):
        tokens = start + tl.arange(0, TILE_TOKENS)
        in_tile = tokens < end
        blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=in_tile, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        tile = (slots * (NUM_KV_HEADS * HEAD_DIM))[:, None] + dims[None, :]
        is_cached = in_tile[:, None]
        if HALF_DIM != TILE_HALF:
            is_cached = is_cached & is_dim
        first_keys, second_keys = load_halves(keys_ptr + tile, is_cached, HALF_DIM)
        first_values, second_values = load_halves(values_ptr + tile, is_cached, HALF_DIM)
        maximum, total, first_mixed, second_mixed = absorb(
            first_query, second_query, first_keys, second_keys,
            first_values, second_values, in_tile,
            maximum, total, first_mixed, second_mixed, scale, UPCAST,
        )
    # fmt: on

    if num_active == 1:
        first_out, second_out = first_mixed / total[:, None], second_mixed / total[:, None]
        store_halves(out_ptrs, first_out, second_out, is_query, HALF_DIM)
    else:
        team = sequence * NUM_KV_HEADS + kv_head
        first_partial = team * tl.num_programs(1) * GROUP
        partials = first_partial + split * GROUP + heads
        partial_ptrs = partials_ptr + partials[:, None] * HEAD_DIM + dims[None, :]
        store_halves(partial_ptrs, first_mixed, second_mixed, is_query, HALF_DIM)
        tl.store(maxima_ptr + partials, maximum, heads < GROUP)
        tl.store(sums_ptr + partials, total, heads < GROUP)
        # All threads' stores come before the arrival that tells of them.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(arrivals_ptr + team, 1, sem="acq_rel", scope="gpu")
        if num_arrived == num_active - 1:
            tl.store(arrivals_ptr + team, 0)
            merge_splits(
                out_ptr + (row * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM),
                partials_ptr + first_partial.to(tl.int64) * HEAD_DIM,
                maxima_ptr + first_partial,
                sums_ptr + first_partial,
                num_active,
                GROUP,
                HEAD_DIM,
                TILE_GROUP,
                2 * TILE_HALF,
                TILE_SPLITS,
            )


@triton.jit
def _prefetch_tokens(
    keys_ptr,
    values_ptr,
    table_ptr,
    begin,
    end,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
):
    """Has the first of a split's keys and values brought into the second-level cache."""
    LINE: tl.constexpr = LINE_BYTES // (keys_ptr.dtype.element_ty.primitive_bitwidth // 8)
    tokens = begin + tl.arange(0, NUM_TOKENS)
    is_cached = tokens < end
    blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=is_cached, other=0)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
    # In the place of tokens that are not there comes the first slot of all.
    places = tl.where(is_cached, slots * (NUM_KV_HEADS * HEAD_DIM), 0)
    for start in tl.static_range(0, HEAD_DIM, LINE):
        prefetch_lines(keys_ptr + places + start)
        prefetch_lines(values_ptr + places + start)
