"""Causal attention of packed sequences: the flash attention that torch ships."""

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from engine.kernels.packed_sequences import PackedSequences

# Until torch 2.11 there is no such parameter, and fewer KV heads than query heads are just taken.
_GROUPED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def causal_varlen(query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences) -> Tensor:
    """``softmax(Q Kᵀ / sqrt(head_dim)) V`` of each sequence; its last query sees its last key.

    ``query`` is ``[num_queries, num_heads, head_dim]``, ``key`` and ``value`` ``[num_keys,
    num_kv_heads, head_dim]``, fp16 or bf16 on a GPU; rows may lie apart, heads may not. The result
    has the shape of ``query``, contiguous.
    """
    out = varlen_attn(
        query,
        key,
        value,
        sequences.query_starts,
        sequences.key_starts,
        sequences.max_queries,
        sequences.max_keys,
        window_size=(-1, 0),
        **_GROUPED_HEADS,
    )
    assert isinstance(out, Tensor)
    return out.contiguous()
