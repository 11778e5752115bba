"""Attention on a GPU: one packed launch for a step's prefills, one for its decodes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import AttentionStep, PagedAttention
from engine.batch import DeviceBatch, FlatBatch
from engine.cuda_ops import split_heads
from engine.device import CudaDevice, Device
from engine.kernels.causal_choice import CausalAttention, choose_causal
from engine.kernels.causal_varlen import causal_varlen
from engine.kernels.decode_workspace import DecodeWorkspace
from engine.kernels.head_rotation import HeadRotation
from engine.kernels.overlap import may_overlap
from engine.kernels.packed_sequences import PackedSequences
from engine.kernels.paged_decode import paged_decode
from engine.kv_cache import KvCache, KvDestination
from engine.lora.delta import Delta, Projected
from engine.models.ops import DecoderOps


@dataclass(frozen=True, slots=True)
class _Prefills:
    """All rows of a step as one packed batch; rows of decodes are in it, to be overwritten.

    ``slots`` ``[num_keys]`` is where the keys of all chunks stand in the cache, one chunk behind
    the other; None: the step's own keys are all there is.
    """

    sequences: PackedSequences
    slots: Tensor | None


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one row each; ``rows`` ``[num_sequences]``, None: all rows in their order."""

    block_tables: Tensor
    context_lens: Tensor
    max_context: int
    rows: Tensor | None


class CudaAttention:
    """One varlen call for the prefills of a step, one kernel for its decodes.

    ``causal`` computes the prefills. None takes float32; steps with a prefill go to the reference
    path then.
    """

    def __init__(
        self,
        cache: KvCache,
        device: Device,
        workspace: DecodeWorkspace,
        causal: CausalAttention = causal_varlen,
    ) -> None:
        self._cache = cache
        self._device = device
        self._workspace = workspace
        self._causal = causal
        self._reference = PagedAttention(cache, device)

    def begin(self, batch: FlatBatch, tensors: DeviceBatch) -> AttentionStep:
        is_decode = batch.row_counts == 1
        if is_decode.all():
            return self.begin_decode(tensors, int(batch.context_lens.max()))
        if self._cache.keys[0].dtype is torch.float32:
            return self._reference.begin(batch, tensors)
        prefills = self._prefills(batch, is_decode)
        decodes = None
        if is_decode.any():
            chunks = np.flatnonzero(is_decode)
            chunks_and_rows = self._device.upload(np.stack((chunks, batch.first_rows[chunks])))
            on_device, rows = chunks_and_rows.unbind(0)
            decodes = _Decodes(
                tensors.block_tables[on_device],
                tensors.context_lens[on_device],
                int(batch.context_lens[chunks].max()),
                rows,
            )
        return self._step(tensors.slot_mapping, prefills, decodes)

    def begin_decode(self, tensors: DeviceBatch, max_context: int) -> AttentionStep:
        """A step of one token a row, in the rows' order; may be captured in a CUDA graph.

        What is launched depends on the shapes of ``tensors`` and on ``max_context`` alone, which
        need not be exact. A row without context, whose slot is negative, stores nothing and gets
        zeros.
        """
        decodes = _Decodes(tensors.block_tables, tensors.context_lens, max_context, None)
        return self._step(tensors.slot_mapping, None, decodes)

    def begin_prefill(self, slots: Tensor, sequences: PackedSequences) -> AttentionStep:
        """A step of whole sequences, from their starts on; may be captured in a CUDA graph.

        Keys and values of row ``i`` go to ``slots[i]``, or nowhere if that is negative. Sequences
        may be empty. What comes of rows that are in none is undefined.
        """
        return self._step(slots, _Prefills(sequences, None), None)

    def _step(
        self, slots: Tensor, prefills: _Prefills | None, decodes: _Decodes | None
    ) -> "_CudaStep":
        return _CudaStep(self._cache, self._workspace, self._causal, slots, prefills, decodes)

    def _prefills(self, batch: FlatBatch, is_decode: npt.NDArray[np.bool_]) -> _Prefills:
        row_counts = batch.row_counts
        num_keys = np.where(is_decode, 1, batch.context_lens)
        slots = None
        if not np.array_equal(num_keys, row_counts):
            slots = self._device.upload(self._key_slots(batch, num_keys, is_decode))
        starts = np.zeros((2, len(row_counts) + 1), dtype=np.int32)
        np.cumsum(np.stack((row_counts, num_keys)), axis=1, out=starts[:, 1:])
        query_starts, key_starts = self._device.upload(starts).unbind(0)
        sequences = PackedSequences(
            query_starts, key_starts, int(row_counts.max()), int(num_keys.max())
        )
        return _Prefills(sequences, slots)

    def _key_slots(
        self, batch: FlatBatch, num_keys: npt.NDArray[np.int64], is_decode: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Slots of each chunk's context; a decode has its own token's only."""
        size = self._cache.block_size
        slots = []
        for chunk, count in enumerate(num_keys.tolist()):
            if is_decode[chunk]:
                slots.append(batch.slot_mapping[batch.first_rows[chunk], None])
            else:
                blocks = batch.block_tables[chunk, : -(-count // size), None]
                slots.append((blocks * size + np.arange(size)).reshape(-1)[:count])
        return np.concatenate(slots)


def open_cuda_attention(cache: KvCache, device: CudaDevice, num_heads: int) -> CudaAttention:
    """Attention over ``cache``, with a workspace of its own for the forward stream.

    The kernel for prefills is chosen, and compiled, here.
    """
    num_kv_heads, head_dim = cache.keys[0].shape[2:]
    on = device.torch_device
    processors = torch.cuda.get_device_properties(on).multi_processor_count
    overlaps = may_overlap(on)
    workspace = DecodeWorkspace(num_heads, num_kv_heads, head_dim, processors, on, overlaps)
    causal = choose_causal(on, cache.keys[0].dtype, num_heads, num_kv_heads, head_dim)
    # The forward stream does not wait for the one that the workspace was filled on.
    device.synchronize()
    return CudaAttention(cache, device, workspace, causal)


class _CudaStep:
    def __init__(
        self,
        cache: KvCache,
        workspace: DecodeWorkspace,
        causal: CausalAttention,
        slot_mapping: Tensor,
        prefills: _Prefills | None,
        decodes: _Decodes | None,
    ) -> None:
        self._cache = cache
        self._workspace = workspace
        self._causal = causal
        self._slot_mapping = slot_mapping
        self._prefills = prefills
        self._decodes = decodes

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
        destination = self.destination(layer)
        if self._prefills is not None or self._decodes is None:
            qkv = Projected(qkv, delta).total()
            return self.attend(layer, *ops.rotate_and_store(qkv, norms, rotation, destination))
        # Each row is one sequence's new token: one launch does all of it.
        query, key, value = split_heads(qkv, destination)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        turn = HeadRotation(rotation, norms, ops.rms_norm_eps, self._slot_mapping)
        self._decode(self._decodes, layer, out, query, key, value, turn, delta)
        return out

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._prefills is None:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        else:
            out = self._prefill(self._prefills, layer, query, key, value)
        if self._decodes is not None:
            self._decode(self._decodes, layer, out, query, key, value, None, None)
        return out

    def _decode(
        self,
        decodes: _Decodes,
        layer: int,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: HeadRotation | None,
        delta: Delta | None,
    ) -> None:
        paged_decode(
            out,
            query,
            key,
            value,
            self._cache.keys[layer],
            self._cache.values[layer],
            decodes.block_tables,
            decodes.context_lens,
            decodes.max_context,
            self._workspace,
            decodes.rows,
            rotation,
            delta,
        )

    def _prefill(
        self, prefills: _Prefills, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        if prefills.slots is not None:
            key = self._cache.keys_by_slot[layer].index_select(0, prefills.slots)
            value = self._cache.values_by_slot[layer].index_select(0, prefills.slots)
        return self._causal(query, key, value, prefills.sequences)
