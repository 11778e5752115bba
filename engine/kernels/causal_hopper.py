"""Causal attention of packed sequences on Hopper: tensor-core tiles fed by its memory accelerator.

A program computes one tile of a sequence's queries for one head: it walks the keys that the tile
sees from the first on, with a running maximum (online softmax). Programs are numbered so that

- the heads of a tile stand side by side: query heads of one KV head find its keys in the L2 cache;
- a sequence's last tile comes first, as it sees the most keys: what ends a launch is little work;
- one sequence comes behind the other, so that few sequences' keys are in use at a time.

Sequence ``i`` has the tiles from ``starts[i] // tile_queries + i`` on, which are enough for its
queries wherever it starts: at most one program a sequence ends without any, however different the
lengths are, and the host need not know them.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao,
"FlashAttention-2" (2023), for the order of the loops.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels.launch import launch
from engine.kernels.packed_sequences import PackedSequences

HEAD_DIMS = (64, 128)
_CAPABILITY = (9, 0)


@dataclass(frozen=True, slots=True)
class CausalTuning:
    """How a prefill's attention is cut up; nothing of it changes the result beyond rounding.

    A program has ``tile_queries`` and takes ``tile_keys`` at a time, ``num_stages`` of them in
    flight. ``max_registers`` a thread, None: as many as the compiler likes. Two programs on a
    multiprocessor hide each other's exponentials behind their products.
    """

    tile_queries: int = 64
    tile_keys: int = 64
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None


def has_causal_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``causal_hopper`` takes such heads on ``device``."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != _CAPABILITY:
        return False
    return dtype in (torch.float16, torch.bfloat16) and head_dim in HEAD_DIMS


def causal_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: PackedSequences,
    tuning: CausalTuning,
) -> Tensor:
    """What ``engine.kernels.causal_varlen.causal_varlen`` computes, see there for the arguments.

    ``head_dim`` is one of ``HEAD_DIMS``; rows begin at multiples of 16 bytes. A sequence has at
    least as many keys as queries. What other sequences' rows hold, numbers or not, has no effect.
    """
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    assert head_dim in HEAD_DIMS and num_heads % num_kv_heads == 0, (query.shape, key.shape)
    assert query.stride()[1:] == (head_dim, 1), query.stride()
    query_starts, key_starts = sequences.query_starts, sequences.key_starts
    assert query_starts.is_contiguous() and key_starts.is_contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if num_queries == 0:
        return out
    num_sequences = len(query_starts) - 1
    num_tiles = num_queries // tuning.tile_queries + num_sequences
    launch(
        _causal_hopper_kernel,
        (num_heads, num_tiles),
        out,
        query,
        _rows(key, tuning.tile_keys),
        _rows(value, tuning.tile_keys),
        query_starts,
        key_starts,
        num_sequences,
        query.stride(0),
        # Exponentials are to the base 2.
        math.log2(math.e) / math.sqrt(head_dim),
        GROUP=num_heads // num_kv_heads,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        TILE_QUERIES=tuning.tile_queries,
        TILE_KEYS=tuning.tile_keys,
        NUM_STAGES=tuning.num_stages,
        num_warps=tuning.num_warps,
        maxnreg=tuning.max_registers,
    )
    return out


def _rows(heads: Tensor, tile_rows: int) -> TensorDescriptor:
    """``heads`` ``[num_rows, num_kv_heads, head_dim]``, to be read by tiles of one head's rows."""
    num_rows, num_heads, head_dim = heads.shape
    assert heads.stride()[1:] == (head_dim, 1), heads.stride()
    shape = [num_rows, num_heads * head_dim]
    return TensorDescriptor(heads, shape, [heads.stride(0), 1], [tile_rows, head_dim])


@triton.jit
def _absorb(scores, value, maximum, total, mixed, scale):
    """Takes another tile's ``scores`` and values into the running softmax."""
    highest = tl.maximum(maximum, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest[:, None])
    fading = tl.exp2(maximum - highest)
    total = total * fading + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * fading[:, None])
    return highest, total, mixed


@triton.jit(
    do_not_specialize=["num_sequences", "scale"],
    do_not_specialize_on_alignment=["query_starts_ptr", "key_starts_ptr"],
)
def _causal_hopper_kernel(
    out_ptr,
    query_ptr,
    keys,
    values,
    query_starts_ptr,
    key_starts_ptr,
    num_sequences,
    query_stride,
    scale,
    GROUP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = 0
    behind = num_sequences
    while sequence + 1 < behind:
        middle = (sequence + behind) // 2
        is_before = tl.load(query_starts_ptr + middle) // TILE_QUERIES + middle <= tile
        sequence = tl.where(is_before, middle, sequence)
        behind = tl.where(is_before, behind, middle)
    query_start = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - query_start
    tile -= query_start // TILE_QUERIES + sequence
    first_query = (tl.cdiv(num_queries, TILE_QUERIES) - 1 - tile) * TILE_QUERIES
    if first_query < 0:
        return
    key_start = tl.load(key_starts_ptr + sequence)
    num_keys = tl.load(key_starts_ptr + sequence + 1) - key_start
    # Of the tile's first query and, behind it, of all.
    first_position = num_keys - num_queries + first_query
    positions = first_position + tl.arange(0, TILE_QUERIES)
    seen = tl.minimum(first_position + TILE_QUERIES, num_keys)
    # Up to here every query of the tile sees every key.
    seen_by_all = (first_position + 1) // TILE_KEYS * TILE_KEYS

    rows = first_query + tl.arange(0, TILE_QUERIES)
    dims = tl.arange(0, HEAD_DIM)
    in_sequence = (rows < num_queries)[:, None]
    rows = (query_start + rows).to(tl.int64)[:, None]
    columns = head * HEAD_DIM + dims[None, :]
    query = tl.load(query_ptr + rows * query_stride + columns, mask=in_sequence, other=0.0)

    column = head // GROUP * HEAD_DIM
    maximum = tl.full((TILE_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_QUERIES,), tl.float32)
    mixed = tl.zeros((TILE_QUERIES, HEAD_DIM), tl.float32)
    for start in tl.range(0, seen_by_all, TILE_KEYS, num_stages=NUM_STAGES):
        scores = tl.dot(query, keys.load([key_start + start, column]).T)
        value = values.load([key_start + start, column])
        maximum, total, mixed = _absorb(scores, value, maximum, total, mixed, scale)
    for start in tl.range(seen_by_all, seen, TILE_KEYS, num_stages=1):
        scores = tl.dot(query, keys.load([key_start + start, column]).T)
        own = start + tl.arange(0, TILE_KEYS)
        scores = tl.where(own[None, :] <= positions[:, None], scores, float("-inf"))
        # Behind the sequence's last row stand others': a weight of zero does not keep out a value
        # that is no number.
        value = values.load([key_start + start, column])
        value = tl.where((own < num_keys)[:, None], value, 0.0)
        maximum, total, mixed = _absorb(scores, value, maximum, total, mixed, scale)

    out_ptrs = out_ptr + rows * (NUM_HEADS * HEAD_DIM) + columns
    tl.store(out_ptrs, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), in_sequence)
