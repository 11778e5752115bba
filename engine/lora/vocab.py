"""The adapters' part of the two layers that are as wide as the vocabulary: embedding and head.

With ``W`` what the base has, or in its place an adapter's own table of ``[vocab, hidden]``:

    embedding:  W[t] + s · B A[:, t]          A [r, vocab], B [hidden, r], t a token id
    head:       x Wᵀ + s · (x Aᵀ) Bᵀ          A [r, hidden], B [vocab, r]

An adapter may have either part, both or neither of each layer. Few have any, so there are no
launches of their own for them: plain torch, on any device, one adapter after the other, over what
the base model computes for all rows. A step without such an adapter computes nothing here, and a
step with one can not be a captured one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from engine.device import Device, torch_dtype
from engine.lora.pool import AdapterPool, check_served
from engine.lora.segments import Segment
from engine.models.decoder import Decoder
from ipc.base_model import BaseModel
from ipc.image import AdapterModule, EntryKind, ImageLayout
from ipc.messages import AdapterId

# Columns of a head whose B is in fp32 at a time: 8 MiB of rank 64, however large the vocabulary is.
_BLOCK_COLUMNS = 1 << 15


@dataclass(frozen=True, slots=True)
class Pair:
    """``a`` is ``[padded_rank, in]``, ``b`` ``[out, padded_rank]``; the padding is zeros."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class VocabWeights:
    """What one adapter has for one of the layers, as views into the arena.

    ``whole`` is ``[vocab, hidden]``, in the place of the base's.
    """

    pair: Pair | None
    whole: Tensor | None


@dataclass(frozen=True, slots=True)
class VocabParts:
    """What one adapter has for embedding and head; None where it leaves one as it is."""

    embedding: VocabWeights | None
    head: VocabWeights | None

    @property
    def has_any(self) -> bool:
        return self.embedding is not None or self.head is not None


class VocabTable:
    """Where the embeddings and heads of the adapters lie that are resident in ``pool``.

    Used on the step thread.
    """

    def __init__(self, base: BaseModel, pool: AdapterPool) -> None:
        self._base = base
        self._pool = pool
        self._resident: dict[AdapterId, VocabParts] = {}
        self._num_with_parts = 0

    def install(
        self,
        adapter_id: AdapterId,
        modules: tuple[AdapterModule, ...],
        layout: ImageLayout,
        extents: tuple[int, ...],
    ) -> None:
        """Rows may ask for the adapter from now on; arguments as for ``AdapterPool.install``.

        Raises:
            AdapterInvalid: the adapter has a part that the forward pass does not apply.
        """
        assert adapter_id not in self._resident, adapter_id
        check_served(self._base, layout)
        embedding, head = (
            self._view(modules, layout, stage, extents[stage])
            for stage in (0, self._base.head_stage)
        )
        parts = self._resident[adapter_id] = VocabParts(embedding, head)
        self._num_with_parts += parts.has_any

    def remove(self, adapter_id: AdapterId) -> None:
        """No row asks for the adapter any more."""
        self._num_with_parts -= self._resident.pop(adapter_id).has_any

    @property
    def has_any(self) -> bool:
        """Whether any resident adapter has a part."""
        return self._num_with_parts > 0

    def parts(self, adapter_id: AdapterId) -> VocabParts:
        """A ``KeyError`` if it is not resident: it must never pass for the base."""
        return self._resident[adapter_id]

    def _view(
        self, modules: tuple[AdapterModule, ...], layout: ImageLayout, stage: int, extent: int
    ) -> VocabWeights | None:
        of_stage = [module for module in modules if module.stage == stage]
        if not of_stage:
            return None
        found = {
            entry.kind: self._pool.extent_view(extent + entry.offset, entry.num_bytes)
            .view(torch_dtype(self._base.dtype))
            .view(entry.rows, entry.columns)
            for entry in layout.stages[stage].entries
        }
        pair = None
        if EntryKind.LORA_A in found:
            (module,) = of_stage
            pair = Pair(found[EntryKind.LORA_A], found[EntryKind.LORA_B], module.scaling)
        return VocabWeights(pair, found.get(EntryKind.WHOLE))


class VocabLayers:
    """The decoder's embedding and head as the adapters of a step's rows have them.

    Everything it launches goes to the current stream, which must be the forward stream. All
    adapters of ``segments`` are resident.
    """

    def __init__(self, decoder: Decoder, table: VocabTable, device: Device) -> None:
        self._decoder = decoder
        self._table = table
        self._device = device

    def are_changed(self, segments: Sequence[Segment]) -> bool:
        """Whether any adapter of the step has a part here."""
        # Most often none is resident, and this runs ahead of every decode.
        return self._table.has_any and any(
            self._table.parts(each.adapter_id).has_any for each in segments
        )

    def embed(self, token_ids: Tensor, segments: Sequence[Segment]) -> Tensor:
        """``[num_tokens, hidden]`` for ``token_ids`` ``[num_tokens]`` int64 of a step's rows."""
        hidden = self._decoder.embed(token_ids)
        for segment in segments:
            weights = self._table.parts(segment.adapter_id).embedding
            if weights is not None:
                rows = slice(segment.start, segment.stop)
                embed_as(hidden[rows], token_ids[rows], weights)
        return hidden

    def logits(
        self, hidden: Tensor, rows: npt.NDArray[np.int64], segments: Sequence[Segment]
    ) -> Tensor:
        """``[num_rows, vocab]`` for ``hidden`` ``[num_rows, hidden]`` behind the last layer.

        ``rows`` ``[num_rows]`` says which of the step's rows each of them is.
        """
        heads = [
            (each, weights)
            for each in segments
            if (weights := self._table.parts(each.adapter_id).head) is not None
        ]
        if not heads:
            return self._decoder.logits(hidden)
        return self._decoder.logits(hidden, partial(self._change_heads, rows, heads))

    def _change_heads(
        self,
        rows: npt.NDArray[np.int64],
        heads: Sequence[tuple[Segment, VocabWeights]],
        x: Tensor,
        logits: Tensor,
    ) -> None:
        for segment, weights in heads:
            (places,) = np.nonzero((rows >= segment.start) & (rows < segment.stop))
            if places.size:
                index = self._device.upload(places)
                logits[index] = head_of(logits[index], x[index], weights)


def embed_as(hidden: Tensor, token_ids: Tensor, weights: VocabWeights) -> None:
    """Makes the base's rows ``hidden`` ``[num_rows, hidden]`` those of an adapter's embedding."""
    if weights.whole is not None:
        hidden.copy_(functional.embedding(token_ids, weights.whole))
    if weights.pair is not None:
        pair = weights.pair
        shrunk = pair.a[:, token_ids].float()
        delta = (pair.b.float() @ shrunk).T
        hidden.copy_(torch.add(hidden.float(), delta, alpha=pair.scaling))


def head_of(logits: Tensor, x: Tensor, weights: VocabWeights) -> Tensor:
    """The logits ``[num_rows, vocab]`` of an adapter, where the base's are ``logits``.

    ``x`` is ``[num_rows, hidden]``. May overwrite ``logits``.
    """
    if weights.whole is not None:
        logits = functional.linear(x, weights.whole)
    if weights.pair is None:
        return logits
    pair = weights.pair
    shrunk = (x.float() @ pair.a.float().T) * pair.scaling
    for first in range(0, logits.shape[1], _BLOCK_COLUMNS):
        columns = slice(first, first + _BLOCK_COLUMNS)
        logits[:, columns] = torch.addmm(
            logits[:, columns].float(), shrunk, pair.b[columns].float().T
        )
    return logits
