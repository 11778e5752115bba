"""The adapters' part of a linear layer: ``y = g ⊙ (y + s · (x Aᵀ) Bᵀ) + bias``, row by row.

``g`` is 1 and ``bias`` 0 where the row's own adapter has none.

This is the reference path: plain torch, on any device, and what faster kernels are compared with.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.lora.delta import Projected
from engine.lora.pool import AdapterPool, LoraWeights
from engine.lora.segments import Segment


@dataclass(frozen=True, slots=True)
class ModuleColumns:
    """Columns ``[start, stop)`` of a fused projection's output are ``module``'s."""

    module: str
    start: int
    stop: int


class Product(Protocol):
    """The base model's part of a projection: ``[num_tokens, out]`` in the model's dtype."""

    def __call__(self, *, is_beside: bool = False) -> Tensor:
        """``is_beside``: on a stream forked from the forward stream, beside adapters' launches.

        Then it leaves these room, and no launch of its own overlaps the one before.
        """
        ...


class LoraStep(Protocol):
    """What a decoder needs of the adapters in one step."""

    def project(
        self, layer: int, group: tuple[ModuleColumns, ...], x: Tensor, product: Product
    ) -> Projected:
        """What ``product`` computes, and for each row what its adapter makes of that row of ``x``.

        ``x`` is ``[num_tokens, in]``, the product ``[num_tokens, out]`` in the model's dtype, both
        contiguous; the modules of ``group`` share ``x`` and lie side by side in ``out``. Calls
        ``product`` once. A delta that comes apart is to be used up before ``x`` of the next call
        is made.
        """
        ...


class LoraBackend(Protocol):
    """How the adapters' part is computed on a device."""

    def begin(self, segments: tuple[Segment, ...]) -> LoraStep:
        """A step whose rows belong to ``segments``; all their adapters are resident."""
        ...


class NoAdapters:
    """A step of base rows alone."""

    def project(
        self, layer: int, group: tuple[ModuleColumns, ...], x: Tensor, product: Product
    ) -> Projected:
        return Projected(product())


class ReferenceLora:
    """One small matrix product after another, on views into the pool."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool

    def begin(self, segments: tuple[Segment, ...]) -> LoraStep:
        return _ReferenceStep(self._pool, segments)


class _ReferenceStep:
    def __init__(self, pool: AdapterPool, segments: tuple[Segment, ...]) -> None:
        self._pool = pool
        self._segments = segments

    def project(
        self, layer: int, group: tuple[ModuleColumns, ...], x: Tensor, product: Product
    ) -> Projected:
        out = product()
        for segment in self._segments:
            rows = slice(segment.start, segment.stop)
            for columns in group:
                weights = self._pool.weights(segment.adapter_id, layer, columns.module)
                if weights is not None:
                    apply_lora(out[rows, columns.start : columns.stop], x[rows], weights)
        return Projected(out)


def apply_lora(out: Tensor, x: Tensor, weights: LoraWeights) -> None:
    """``out = g ⊙ (out + s · (x Aᵀ) Bᵀ) + bias``, computed in fp32 and rounded once.

    ``x`` is ``[rows, in]``, ``out`` ``[rows, out]`` and may be a view with any strides.
    """
    shrunk = x.float() @ weights.a.float().T
    total = torch.add(out.float(), shrunk @ weights.b.float().T, alpha=weights.scaling)
    if weights.row_scale is not None:
        total *= weights.row_scale
    if weights.bias is not None:
        total += weights.bias
    out.copy_(total)
