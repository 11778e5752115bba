"""The decoder's operations as Triton kernels."""

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.add_residual import add_residual
from engine.kernels.few_rows_product import MAX_ROWS, ProductScratch, few_rows_product, tuning_for
from engine.kernels.head_rotation import HeadRotation
from engine.kernels.overlap import may_overlap
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope_kv import rope_kv
from engine.kernels.silu_mul import silu_mul
from engine.kv_cache import KvDestination
from engine.lora.delta import Delta


class FusedOps:
    """``DecoderOps`` with one launch each, rounded to the model's dtype where transformers rounds.

    A token whose slot is negative is not stored. Products of few rows in half precision are our
    own where launches may overlap, all others the library's.
    """

    def __init__(self, rms_norm_eps: float, device: torch.device) -> None:
        self._eps = rms_norm_eps
        self._overlaps = may_overlap(device)
        self._scratch = None
        if self._overlaps:
            properties = torch.cuda.get_device_properties(device)
            self._scratch = ProductScratch(properties.multi_processor_count, device)

    @property
    def rms_norm_eps(self) -> float:
        return self._eps

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_beside: bool = False
    ) -> Tensor:
        if self._scratch is None or len(x) > MAX_ROWS or x.dtype is torch.float32:
            return functional.linear(x, weight, bias)
        overlaps = not is_beside
        tuning = tuning_for(len(x), overlaps)
        return few_rows_product(x, weight, bias, self._scratch, tuning, overlaps)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps, self._overlaps)

    def add(self, residual: Tensor, x: Tensor, delta: Delta | None = None) -> Tensor:
        if delta is None:
            return residual.add_(x)
        add_residual(residual, x, delta, self._overlaps)
        return residual

    def add_rms_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, delta: Delta | None = None
    ) -> Tensor:
        return add_rms_norm(residual, x, weight, self._eps, self._overlaps, delta)

    def rotate_and_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        rotation: Tensor,
        destination: KvDestination,
    ) -> tuple[Tensor, Tensor, Tensor]:
        turn = HeadRotation(rotation, norms, self._eps, destination.slots)
        rope_kv(qkv, turn, destination.keys, destination.values, self._overlaps)
        return split_heads(qkv, destination)

    def silu_mul(self, gate_up: Tensor, delta: Delta | None = None) -> Tensor:
        return silu_mul(gate_up, self._overlaps, delta)


def split_heads(qkv: Tensor, destination: KvDestination) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a projection's queries, keys and values, ``[num_tokens, heads, head_dim]`` each."""
    num_kv_heads, head_dim = destination.keys.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return query, key, value
