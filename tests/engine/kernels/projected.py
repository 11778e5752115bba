"""A projection's rows over a paged cache: what of them is rotated, stored and attended to."""

from dataclasses import replace

import torch
from torch import Tensor

from engine.kernels.head_rotation import HeadRotation
from engine.lora.delta import Delta
from tests.engine.kernels.paged_cache import PagedCache, make_cache, make_workspace, run

EPS = 1e-6
# Around the edges of blocks and of splits, with one row that only fills up the batch.
LENGTHS = [33, 1, 0, 2, 17, 34, 130]


def make_rotation(
    cache: PagedCache, head_dim: int, dtype: torch.dtype, has_norms: bool
) -> HeadRotation:
    device = cache.keys.device
    angles = 10 * torch.randn(len(cache.slots), head_dim // 2, device=device)
    norms = None
    if has_norms:
        query_norm, key_norm = torch.randn(2, head_dim, device=device).to(dtype)
        norms = query_norm, key_norm
    rotation = torch.stack((angles.cos(), angles.sin()), dim=1)
    return HeadRotation(rotation, norms, EPS, cache.slots)


def make_projected(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[PagedCache, Tensor]:
    """A cache of ``LENGTHS``, and queries, keys and values of its new tokens side by side.

    These are ``[num_sequences, (num_heads + 2 * num_kv_heads) * head_dim]``.
    """
    cache = make_cache(LENGTHS, num_kv_heads, head_dim, dtype, device)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    return cache, torch.randn(len(LENGTHS), width, device=device).to(dtype)


def with_own_memory(cache: PagedCache) -> PagedCache:
    """The same cache; what is stored in the one does not reach the other."""
    return replace(cache, keys=cache.keys.clone(), values=cache.values.clone())


def attend(
    qkv: Tensor,
    cache: PagedCache,
    rotation: HeadRotation | None = None,
    delta: Delta | None = None,
) -> Tensor:
    """Paged decode of such rows ``[num_sequences, num_heads, head_dim]``; stores as it rotates."""
    num_kv_heads, head_dim = cache.keys.shape[2:]
    heads = qkv.view(len(qkv), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cache = replace(cache, key=key, value=value)
    return run(query, cache, make_workspace(num_heads, cache), rotation=rotation, delta=delta)
