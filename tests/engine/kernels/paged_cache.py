"""Sequences in a paged cache whose other slots are not numbers, and their attention in fp32."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.kernels.decode_workspace import DecodeTuning, DecodeWorkspace
from engine.kernels.head_rotation import HeadRotation
from engine.kernels.overlap import may_overlap
from engine.kernels.paged_decode import paged_decode
from engine.lora.delta import Delta

BLOCK_SIZE = 16
# Few and small, so that the interpreter is quick and contexts have many splits.
SMALL = DecodeTuning(tile_tokens=16, min_split_tokens=32)


@dataclass
class PagedCache:
    """Sequences of the lengths ``context_lens`` in shuffled blocks; the rest is not a number.

    So is the slot of each sequence's last token: ``key`` and ``value`` ``[num_sequences, heads,
    dim]`` have it instead. ``slots`` ``[num_sequences]`` says where it belongs, -1 without context.
    """

    keys: Tensor
    values: Tensor
    block_tables: Tensor
    context_lens: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor

    def attend(self, query: Tensor) -> Tensor:
        """What paged decode is to compute, in fp32 and one sequence after another."""
        out = torch.zeros(query.shape, device=query.device)
        for index, length in enumerate(self.context_lens.tolist()):
            if length:
                blocks = self.block_tables[index, : -(-length // BLOCK_SIZE)].long()
                keys, values = (
                    torch.cat((memory[blocks].flatten(0, 1)[: length - 1], own[index, None]))
                    .float()
                    .transpose(0, 1)
                    for memory, own in ((self.keys, self.key), (self.values, self.value))
                )
                attended = scaled_dot_product_attention(
                    query[index].float().unsqueeze(1), keys, values, enable_gqa=True
                )
                out[index] = attended.squeeze(1)
        return out


def make_cache(
    context_lens: list[int],
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    first_block: int = 0,
) -> PagedCache:
    counts = [-(-length // BLOCK_SIZE) for length in context_lens]
    num_blocks = first_block + sum(counts) + 3
    free = first_block + torch.randperm(sum(counts) + 3)
    # Behind a context the tables name a block that there is not.
    tables = torch.full((len(counts), max(counts) + 2), num_blocks)
    shape = (2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    memory = torch.empty(shape, dtype=dtype, device=device)
    memory[:, first_block:] = torch.nan
    own_slots = []
    for index, (count, length) in enumerate(zip(counts, context_lens, strict=True)):
        tables[index, :count], free = free[:count], free[count:]
        positions = torch.arange(length)
        slots = tables[index, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        own_slots.append(int(slots[-1]) if length else -1)
        cached = slots[:-1].to(device)
        values = torch.randn(2, len(cached), num_kv_heads, head_dim, device=device)
        memory.flatten(1, 2)[:, cached] = values.to(dtype)
    keys, values = memory.unbind(0)
    own = torch.randn(2, len(counts), num_kv_heads, head_dim, device=device).to(dtype)
    return PagedCache(
        keys,
        values,
        tables.to(device),
        torch.tensor(context_lens, device=device),
        own[0],
        own[1],
        torch.tensor(own_slots, device=device),
    )


def make_workspace(
    num_heads: int, cache: PagedCache, tuning: DecodeTuning | None = SMALL, processors: int = 12
) -> DecodeWorkspace:
    num_kv_heads, head_dim = cache.keys.shape[2:]
    device = cache.keys.device
    overlaps = may_overlap(device)
    return DecodeWorkspace(num_heads, num_kv_heads, head_dim, processors, device, overlaps, tuning)


def run(
    query: Tensor,
    cache: PagedCache,
    workspace: DecodeWorkspace,
    max_context: int | None = None,
    rotation: HeadRotation | None = None,
    delta: Delta | None = None,
) -> Tensor:
    """Paged decode of one row a sequence, its results written over what is not a number."""
    out = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    if max_context is None:
        max_context = int(cache.context_lens.max())
    paged_decode(
        out,
        query,
        cache.key,
        cache.value,
        cache.keys,
        cache.values,
        cache.block_tables,
        cache.context_lens,
        max_context,
        workspace,
        rotation=rotation,
        delta=delta,
    )
    assert not workspace.arrivals.any()
    return out
