"""Attention over a paged cache: the reference path, plain torch on any device.

A step's chunks are of two sorts. A *prefill* has several tokens and is computed alone. *Decodes*
have one token each and are computed together, in groups of similar context length, so that the
padding of a group to its longest member costs at most as much again as the group itself.

Only slots that hold the sequence's own tokens are ever read: padding repeats the sequence's first
token under the mask. A value that is not a number in another sequence's part of the cache can
therefore not reach it, which a mask alone would not ensure (0 · NaN is NaN).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.batch import DeviceBatch, FlatBatch
from engine.device import Device
from engine.kv_cache import KvCache, KvDestination
from engine.lora.delta import Delta, Projected
from engine.models.ops import DecoderOps

# A group of decodes is padded to at most this many times its shortest context.
_MAX_PADDING = 2


class AttentionStep(Protocol):
    """What a decoder needs of attention in one step."""

    def destination(self, layer: int) -> KvDestination:
        """Where the keys and values of the step's own tokens are to be stored."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to each token's whole context; the step's own tokens have been stored already.

        ``query`` is ``[num_tokens, num_heads, head_dim]``, ``key`` and ``value``
        ``[num_tokens, num_kv_heads, head_dim]``; the result has the shape of ``query``, contiguous.
        """
        ...

    def attend_projected(
        self,
        layer: int,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        rotation: Tensor,
        ops: DecoderOps,
        delta: Delta | None = None,
    ) -> Tensor:
        """``attend`` of what ``ops.rotate_and_store`` makes of the other arguments, in one go.

        Before that, ``qkv`` gets its delta. Keys and values are stored at ``destination(layer)``;
        ``qkv`` may be overwritten.
        """
        ...


class AttentionBackend(Protocol):
    """How attention is computed on a device."""

    def begin(self, batch: FlatBatch, tensors: DeviceBatch) -> AttentionStep:
        """A step over the chunks of ``batch``, which ``tensors`` holds on the device."""
        ...


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Rows ``[start, stop)``; see ``_prefill`` for ``slots`` and ``mask``."""

    start: int
    stop: int
    slots: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """``rows`` ``[n]``; ``slots`` ``[n, context]``; ``mask`` ``[n, 1, 1, context]``, True: seen."""

    rows: Tensor
    slots: Tensor
    mask: Tensor | None


class PagedAttention:
    """Gathers each sequence's pages and gives them to torch's own attention."""

    def __init__(self, cache: KvCache, device: Device) -> None:
        self._cache = cache
        self._device = device

    def begin(self, batch: FlatBatch, tensors: DeviceBatch) -> AttentionStep:
        prefills: list[_Prefill] = []
        decodes: list[int] = []
        for chunk, num_rows in enumerate(batch.row_counts.tolist()):
            if num_rows == 1:
                decodes.append(chunk)
            else:
                prefills.append(self._prefill(batch, tensors, chunk))
        return _PagedStep(
            self._cache,
            tensors.slot_mapping,
            prefills,
            self._decode_groups(batch, tensors, decodes),
        )

    def _slots(self, tables: Tensor, num_tokens: int) -> Tensor:
        """Slots of positions ``[0, num_tokens)`` by ``tables`` ``[n, num_blocks]``."""
        size = self._cache.block_size
        tables = tables[:, : -(-num_tokens // size)]
        offsets = torch.arange(size, device=tables.device)
        return (tables.unsqueeze(2) * size + offsets).flatten(1)[:, :num_tokens]

    def _prefill(self, batch: FlatBatch, tensors: DeviceBatch, chunk: int) -> _Prefill:
        """A chunk from the sequence's start needs no cache: causal attention to itself."""
        start = int(batch.first_rows[chunk])
        num_rows = int(batch.row_counts[chunk])
        context = int(batch.context_lens[chunk])
        if context == num_rows:
            return _Prefill(start, start + num_rows, None, None)
        slots = self._slots(tensors.block_tables[chunk : chunk + 1], context)[0]
        positions = torch.arange(context, device=slots.device)
        mask = positions <= positions[context - num_rows :].unsqueeze(1)
        return _Prefill(start, start + num_rows, slots, mask)

    def _decode_groups(
        self, batch: FlatBatch, tensors: DeviceBatch, chunks: list[int]
    ) -> list[_DecodeGroup]:
        if not chunks:
            return []
        context_lens = batch.context_lens
        chunks = sorted(chunks, key=context_lens.tolist().__getitem__)
        order = np.array(chunks, dtype=np.int64)
        chunk_and_row = self._device.upload(np.stack((order, batch.first_rows[order])))
        groups = []
        for begin, end in _group_bounds(context_lens[order].tolist()):
            index, rows = chunk_and_row[:, begin:end]
            longest = int(context_lens[order[end - 1]])
            slots = self._slots(tensors.block_tables[index], longest)
            mask = None
            if context_lens[order[begin]] != longest:
                seen = torch.arange(longest, device=slots.device) < tensors.context_lens[
                    index
                ].unsqueeze(1)
                slots = torch.where(seen, slots, slots[:, :1])
                mask = seen[:, None, None, :]
            groups.append(_DecodeGroup(rows, slots, mask))
        return groups


def _group_bounds(sorted_lens: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open ranges of ``sorted_lens`` (rising) within which padding stays bounded."""
    bounds = []
    begin = 0
    for end, length in enumerate(sorted_lens):
        if length > _MAX_PADDING * sorted_lens[begin]:
            bounds.append((begin, end))
            begin = end
    bounds.append((begin, len(sorted_lens)))
    return bounds


class _PagedStep:
    def __init__(
        self,
        cache: KvCache,
        slot_mapping: Tensor,
        prefills: list[_Prefill],
        decode_groups: list[_DecodeGroup],
    ) -> None:
        self._cache = cache
        self._slot_mapping = slot_mapping
        self._prefills = prefills
        self._decode_groups = decode_groups

    def destination(self, layer: int) -> KvDestination:
        return self._cache.destination(layer, self._slot_mapping)

    def attend_projected(
        self,
        layer: int,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        rotation: Tensor,
        ops: DecoderOps,
        delta: Delta | None = None,
    ) -> Tensor:
        qkv = Projected(qkv, delta).total()
        heads = ops.rotate_and_store(qkv, norms, rotation, self.destination(layer))
        return self.attend(layer, *heads)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys = self._cache.keys_by_slot[layer]
        values = self._cache.values_by_slot[layer]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for prefill in self._prefills:
            rows = slice(prefill.start, prefill.stop)
            if prefill.slots is None:
                seen_keys, seen_values = key[rows], value[rows]
            else:
                seen_keys, seen_values = keys[prefill.slots], values[prefill.slots]
            mixed = scaled_dot_product_attention(
                query[rows].transpose(0, 1).unsqueeze(0),
                seen_keys.transpose(0, 1).unsqueeze(0),
                seen_values.transpose(0, 1).unsqueeze(0),
                attn_mask=prefill.mask,
                is_causal=prefill.mask is None,
                enable_gqa=True,
            )
            out[rows] = mixed[0].transpose(0, 1)
        for group in self._decode_groups:
            # The query heads that share a KV head take the place of query positions.
            num_decodes = group.rows.shape[0]
            by_kv_head = query[group.rows].view(num_decodes, key.shape[1], -1, key.shape[2])
            mixed = scaled_dot_product_attention(
                by_kv_head,
                keys[group.slots].transpose(1, 2),
                values[group.slots].transpose(1, 2),
                attn_mask=group.mask,
            )
            out[group.rows] = mixed.flatten(1, 2)
        return out
