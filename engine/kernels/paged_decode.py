"""Attention of one new token a sequence over its pages, in a single launch.

Context lengths are data: the grid depends on the number of rows and on the longest context to
expect alone, so that a CUDA graph replays for every context. What a program does with its part is
in ``engine.kernels.paged_decode_kernel``.
"""

import math

import torch
import triton
from torch import Tensor

from engine.kernels.decode_workspace import DecodeWorkspace
from engine.kernels.head_rotation import HeadRotation
from engine.kernels.launch import launch
from engine.kernels.paged_decode_kernel import paged_decode_kernel
from engine.kernels.whole_numbers import next_power_of_2
from engine.lora.delta import Delta

# The smallest number of rows that the tensor cores' product takes.
_MIN_DOT_ROWS = 16


def paged_decode(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context: int,
    workspace: DecodeWorkspace,
    rows: Tensor | None = None,
    rotation: HeadRotation | None = None,
    delta: Delta | None = None,
) -> None:
    """Writes ``out[r] = softmax(query[r] Kᵀ / sqrt(head_dim)) V`` for the row of each sequence.

    Row ``r`` of sequence ``i`` is ``rows[i]``, or ``i`` where ``rows`` is None; other rows of
    ``out`` are kept. K and V are those of ``context_lens[i]`` tokens: ``key[r]`` and ``value[r]``
    of the last one, before it what lies in the blocks that ``block_tables[i]`` names; no other slot
    is read. A sequence without context gets zeros.

    With ``rotation`` heads are as the projection left them: ``query`` and ``key`` count as normed
    and rotated, and ``key`` and ``value`` of each sequence with a context are stored at its slot.
    Without, they are ready, and nothing is stored. With both ``rotation`` and ``delta``, all three
    count as with that added first, which has the queries' columns, the keys' and the values'.

    | tensor                    | shape; rows of `*` may lie apart, else contiguous  | dtype       |
    |---------------------------|----------------------------------------------------|-------------|
    | `out`                     | `[num_rows, num_heads, head_dim]`                  | the model's |
    | `query` *                 | that of `out`                                      | the model's |
    | `key` *, `value` *        | `[num_rows, num_kv_heads, head_dim]`               | the model's |
    | `keys`, `values`          | `[num_blocks, block_size, num_kv_heads, head_dim]` | the model's |
    | `block_tables` *          | `[num_sequences, max_blocks]`                      | int32/int64 |
    | `context_lens`            | `[num_sequences]`                                  | int32/int64 |
    | `rows`                    | `[num_sequences]`, no row twice                    | int32/int64 |

    Products take the model's dtype (fp32, fp16 or bf16), sums are fp32. ``max_context`` need not be
    exact, see ``DecodeWorkspace.num_splits``. Mutates ``out``, with ``rotation`` also ``keys`` and
    ``values``, and meanwhile ``workspace``. Where launches overlap, ``context_lens``, ``rows`` and
    ``block_tables`` must be older than the last that does not.

    Source: Dao et al., "Flash-Decoding for long-context inference".
    """
    num_heads, num_kv_heads, head_dim = (
        workspace.num_heads,
        workspace.num_kv_heads,
        workspace.head_dim,
    )
    num_sequences = context_lens.shape[0]
    num_rows = out.shape[0]
    block_size = keys.shape[1]
    assert query.shape == out.shape == (num_rows, num_heads, head_dim), query.shape
    assert key.shape == value.shape == (num_rows, num_kv_heads, head_dim), key.shape
    for heads in (query, key, value):
        assert heads.stride()[1:] == (head_dim, 1), heads.stride()
    assert keys.shape == values.shape and keys.shape[2:] == (num_kv_heads, head_dim), keys.shape
    assert out.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
    assert query.dtype == key.dtype == value.dtype == out.dtype == keys.dtype == values.dtype
    assert head_dim % 2 == 0, head_dim
    assert block_tables.shape[0] == num_sequences and block_tables.stride(1) == 1
    assert context_lens.is_contiguous()
    assert (out.shape if rows is None else rows.shape)[0] == num_sequences
    if rotation is not None:
        rotation.check(num_rows, keys)
    if num_sequences == 0:
        return
    tuning = workspace.tuning
    group = num_heads // num_kv_heads
    num_splits = workspace.num_splits(num_sequences, max_context)
    overlaps = workspace.overlaps
    if delta is not None:
        assert rotation is not None
        delta.check(num_rows, (num_heads + 2 * num_kv_heads) * head_dim)
        overlaps = overlaps and delta.overlaps
    query_norm, key_norm = (rotation and rotation.norms) or (None, None)
    launch(
        paged_decode_kernel,
        (num_kv_heads, num_splits, num_sequences),
        out,
        query,
        key,
        value,
        keys,
        values,
        block_tables,
        context_lens,
        rows,
        rotation and rotation.rotation,
        query_norm,
        key_norm,
        rotation and rotation.slots,
        delta and delta.values,
        delta and delta.has_adapter,
        workspace.partials,
        workspace.maxima,
        workspace.sums,
        workspace.arrivals,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        block_tables.stride(0),
        rotation.eps if rotation else 0.0,
        # Powers of two are cheaper than those of e.
        math.log2(math.e) / math.sqrt(head_dim),
        tuning.min_split_tokens,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HALF_DIM=head_dim // 2,
        BLOCK_SIZE=block_size,
        HAS_ROWS=rows is not None,
        ROTATES=rotation is not None,
        HAS_NORMS=query_norm is not None,
        HAS_DELTA=delta is not None,
        TILE_GROUP=next_power_of_2(group),
        TILE_HEADS=max(_MIN_DOT_ROWS, next_power_of_2(group)),
        TILE_HALF=max(_MIN_DOT_ROWS, next_power_of_2(head_dim // 2)),
        TILE_TOKENS=tuning.tile_tokens,
        PREFETCHED_TOKENS=tuning.prefetched_tokens * (num_sequences <= tuning.prefetched_rows),
        TILE_SPLITS=8,
        NUM_STAGES=tuning.num_stages,
        # The interpreter's product of bf16 is wrong.
        UPCAST=triton.knobs.runtime.interpret and out.dtype is torch.bfloat16,
        OVERLAPS=overlaps,
        num_warps=tuning.num_warps,
        launch_pdl=overlaps,
    )
