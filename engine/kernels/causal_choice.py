"""Which kernel computes the causal attention of packed sequences."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.kernels.causal_hopper import CausalTuning, causal_hopper, has_causal_hopper
from engine.kernels.causal_varlen import causal_varlen
from engine.kernels.packed_sequences import PackedSequences

CausalAttention = Callable[[Tensor, Tensor, Tensor, PackedSequences], Tensor]
"""What ``engine.kernels.causal_varlen.causal_varlen`` describes, by whatever kernel."""


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
    causal = partial(causal_hopper, tuning=CausalTuning())
    # As a model's projections leave the heads of one token.
    heads = torch.zeros(1, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
    query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    starts = torch.arange(2, dtype=torch.int32, device=device)
    causal(query, key, value, PackedSequences(starts, starts, max_queries=1, max_keys=1))
    return causal
