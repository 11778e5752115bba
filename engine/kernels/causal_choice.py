"""Which kernel computes the causal attention of packed sequences."""

from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.causal_hopper import CausalTuning, causal_hopper, has_causal_hopper
from engine.kernels.causal_varlen import causal_varlen


class CausalAttention(Protocol):
    """What ``engine.kernels.causal_varlen.causal_varlen`` describes, by whatever kernel."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        max_queries: int,
        max_keys: int,
    ) -> Tensor: ...


class HopperAttention:
    """``causal_hopper`` with a tuning."""

    def __init__(self, tuning: CausalTuning) -> None:
        self._tuning = tuning

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        max_queries: int,
        max_keys: int,
    ) -> Tensor:
        return causal_hopper(query, key, value, query_starts, key_starts, self._tuning)


def choose_causal(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> CausalAttention:
    """Our own kernel where the GPU and the heads are those it is made for, else torch's.

    Ours is compiled here, so that no request waits for it.
    """
    if not has_causal_hopper(device, dtype, head_dim):
        return causal_varlen
    causal = HopperAttention(CausalTuning())
    # As a model's projections leave the heads of one token.
    heads = torch.zeros(1, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
    query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    starts = torch.arange(2, dtype=torch.int32, device=device)
    causal(query, key, value, starts, starts, 1, 1)
    return causal
