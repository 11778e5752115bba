"""Attention of one new token a sequence over its pages, in a single launch.

Flash decoding: a context is split over several programs, so that a few long sequences fill the
GPU. Each leaves its partial softmax in the workspace, and the last one to arrive for a sequence
and KV head merges them. Context lengths are data: the grid depends on the number of rows and on
the longest context to expect alone, so that a CUDA graph replays for every context.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# The smallest number of rows that the tensor cores' product takes.
_MIN_DOT_ROWS = 16


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """How a decode is cut up; nothing of it changes the result beyond rounding.

    A program takes ``tile_tokens`` at a time, of at least ``min_split_tokens`` altogether, and
    there are about ``programs_per_processor`` of them on each multiprocessor.
    """

    tile_tokens: int = 64
    min_split_tokens: int = 128
    programs_per_processor: int = 2
    num_warps: int = 4
    num_stages: int = 5


class DecodeWorkspace:
    """Owns what the programs of one launch leave to each other; for launches of one stream.

    ``partials`` is ``[max_partials, head_dim]``, ``maxima`` and ``sums`` ``[max_partials]`` fp32;
    ``arrivals`` ``[num_programs]`` int32, zeros between launches.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_processors: int,
        device: torch.device,
        tuning: DecodeTuning | None = None,
    ) -> None:
        self.tuning = tuning or DecodeTuning()
        assert self.tuning.min_split_tokens % self.tuning.tile_tokens == 0, self.tuning
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        # More splits than run at once would make the last ones a second round.
        self._num_programs = self.tuning.programs_per_processor * num_processors
        max_partials = self._num_programs * (num_heads // num_kv_heads)
        self.partials = torch.empty(max_partials, head_dim, device=device)
        self.maxima = torch.empty(max_partials, device=device)
        self.sums = torch.empty(max_partials, device=device)
        self.arrivals = torch.zeros(self._num_programs, dtype=torch.int32, device=device)

    def num_splits(self, num_rows: int, max_context: int) -> int:
        """Programs for each row and KV head, where no context is expected beyond ``max_context``.

        A longer one is computed as well, in longer splits.
        """
        that_fit = self._num_programs // (num_rows * self.num_kv_heads)
        return max(1, min(that_fit, -(-max_context // self.tuning.min_split_tokens)))


def paged_decode(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context: int,
    workspace: DecodeWorkspace,
    rows: Tensor | None = None,
) -> None:
    """Writes ``out[r] = softmax(query[r] Kᵀ / sqrt(head_dim)) V`` for the row of each sequence.

    Row ``r`` of sequence ``i`` is ``rows[i]``, or ``i`` where ``rows`` is None; other rows of
    ``out`` are kept. K and V are the first ``context_lens[i]`` tokens of the blocks that
    ``block_tables[i]`` names; no other slot is read. A sequence without context gets zeros.

    | tensor           | shape; rows of `*` may lie apart, else contiguous   | dtype          |
    |------------------|-----------------------------------------------------|----------------|
    | `out`            | `[num_rows, num_heads, head_dim]`                   | the model's    |
    | `query` *        | that of `out`                                       | the model's    |
    | `keys`, `values` | `[num_blocks, block_size, num_kv_heads, head_dim]`  | the model's    |
    | `block_tables` * | `[num_sequences, max_blocks]`                       | int32 or int64 |
    | `context_lens`   | `[num_sequences]`                                   | int32 or int64 |
    | `rows`           | `[num_sequences]`, no row twice                     | int32 or int64 |

    Products take the model's dtype (fp32, fp16 or bf16), sums are fp32. ``max_context`` need not be
    exact, see ``DecodeWorkspace.num_splits``. Mutates ``out`` and, meanwhile, ``workspace``.

    Source: Dao et al., "Flash-Decoding for long-context inference".
    """
    num_heads, num_kv_heads, head_dim = (
        workspace.num_heads,
        workspace.num_kv_heads,
        workspace.head_dim,
    )
    num_sequences = context_lens.shape[0]
    block_size = keys.shape[1]
    assert query.shape == out.shape and query.shape[1:] == (num_heads, head_dim), query.shape
    assert query.stride()[1:] == (head_dim, 1) and out.is_contiguous(), query.stride()
    assert keys.shape == values.shape and keys.shape[2:] == (num_kv_heads, head_dim), keys.shape
    assert keys.is_contiguous() and values.is_contiguous(), keys.stride()
    assert query.dtype == out.dtype == keys.dtype == values.dtype, (query.dtype, keys.dtype)
    assert block_tables.shape[0] == num_sequences and block_tables.stride(1) == 1
    assert context_lens.is_contiguous()
    assert (query.shape if rows is None else rows.shape)[0] == num_sequences
    if num_sequences == 0:
        return
    tuning = workspace.tuning
    group = num_heads // num_kv_heads
    num_splits = workspace.num_splits(num_sequences, max_context)
    _paged_decode_kernel[(num_kv_heads, num_splits, num_sequences)](
        out,
        query,
        keys,
        values,
        block_tables,
        context_lens,
        rows,
        workspace.partials,
        workspace.maxima,
        workspace.sums,
        workspace.arrivals,
        query.stride(0),
        block_tables.stride(0),
        # Powers of two are cheaper than those of e.
        math.log2(math.e) / math.sqrt(head_dim),
        tuning.min_split_tokens,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HAS_ROWS=rows is not None,
        TILE_GROUP=triton.next_power_of_2(group),
        TILE_HEADS=max(_MIN_DOT_ROWS, triton.next_power_of_2(group)),
        TILE_DIM=max(_MIN_DOT_ROWS, triton.next_power_of_2(head_dim)),
        TILE_TOKENS=tuning.tile_tokens,
        TILE_SPLITS=8,
        NUM_STAGES=tuning.num_stages,
        # The interpreter's product of bf16 is wrong.
        UPCAST=triton.knobs.runtime.interpret and out.dtype is torch.bfloat16,
        num_warps=tuning.num_warps,
    )


@triton.jit(do_not_specialize=["query_stride", "table_stride"])
def _paged_decode_kernel(
    out_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    context_lens_ptr,
    rows_ptr,
    partials_ptr,
    maxima_ptr,
    sums_ptr,
    arrivals_ptr,
    query_stride,
    table_stride,
    scale,
    min_split_tokens,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One split of one sequence for the ``GROUP`` query heads that share a KV head."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    context = tl.load(context_lens_ptr + sequence).to(tl.int32)
    row = sequence.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + sequence).to(tl.int64)

    split_tokens = tl.cdiv(tl.cdiv(context, tl.num_programs(1)), TILE_TOKENS) * TILE_TOKENS
    split_tokens = tl.maximum(split_tokens, min_split_tokens)
    num_active = tl.cdiv(context, split_tokens)

    heads = tl.arange(0, TILE_HEADS)
    dims = tl.arange(0, TILE_DIM)
    head_mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    head_offsets = (kv_head * GROUP + heads)[:, None] * HEAD_DIM + dims[None, :]
    out_ptrs = out_ptr + row * (NUM_KV_HEADS * GROUP * HEAD_DIM) + head_offsets
    if (context == 0) & (split == 0):
        tl.store(out_ptrs, tl.zeros((TILE_HEADS, TILE_DIM), out_ptr.dtype.element_ty), head_mask)
    if split >= num_active:
        return

    query = tl.load(query_ptr + row * query_stride + head_offsets, mask=head_mask, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    maximum = tl.full((TILE_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_HEADS,), tl.float32)
    mixed = tl.zeros((TILE_HEADS, TILE_DIM), tl.float32)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, context)
    for start in tl.range(begin, end, TILE_TOKENS, num_stages=NUM_STAGES):
        tokens = start + tl.arange(0, TILE_TOKENS)
        seen = tokens < end
        blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        slots = blocks * BLOCK_SIZE + tokens % BLOCK_SIZE
        offsets = (slots * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM + dims[None, :]
        # What is not loaded is zero: a product with a value that is not a number would be none.
        mask = seen[:, None]
        if HEAD_DIM != TILE_DIM:
            mask = mask & (dims < HEAD_DIM)[None, :]
        keys = tl.load(keys_ptr + offsets, mask=mask, other=0.0)
        values = tl.load(values_ptr + offsets, mask=mask, other=0.0)
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, 1)
        mixed = tl.dot(
            weights.to(values.dtype), values, mixed * decay[:, None], input_precision="ieee"
        )
        maximum = new_maximum

    if num_active == 1:
        tl.store(out_ptrs, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), head_mask)
    else:
        team = sequence * NUM_KV_HEADS + kv_head
        first_partial = team * tl.num_programs(1) * GROUP
        partials = first_partial + split * GROUP + heads
        tl.store(partials_ptr + partials[:, None] * HEAD_DIM + dims[None, :], mixed, head_mask)
        tl.store(maxima_ptr + partials, maximum, heads < GROUP)
        tl.store(sums_ptr + partials, total, heads < GROUP)
        # All threads' stores come before the arrival that tells of them.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(arrivals_ptr + team, 1, sem="acq_rel", scope="gpu")
        if num_arrived == num_active - 1:
            tl.store(arrivals_ptr + team, 0)
            _merge_splits(
                out_ptr + (row * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM),
                partials_ptr + first_partial.to(tl.int64) * HEAD_DIM,
                maxima_ptr + first_partial,
                sums_ptr + first_partial,
                num_active,
                GROUP,
                HEAD_DIM,
                TILE_GROUP,
                TILE_DIM,
                TILE_SPLITS,
            )


@triton.jit
def _merge_splits(
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
