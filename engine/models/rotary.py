"""Rotary position embedding: each pair ``(i, i + head_dim / 2)`` of a head turns with position."""

import math

import torch
from torch import Tensor

from engine.models.config import LinearScaling, Llama3Scaling, Rope


def rotary_table(rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """``[num_positions, 2, head_dim / 2]`` fp32: cosines and sines of each position's angles.

    Computed on the CPU, so that every device has the same bits.
    """
    frequencies = _frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Turns ``heads`` ``[num_tokens, num_heads, head_dim]`` by their tokens' angles.

    ``rotation`` is ``[num_tokens, 2, head_dim / 2]`` fp32, rows of ``rotary_table``. The result is
    computed in fp32, contiguous, and has the dtype of ``heads``.
    """
    cosine, sine = rotation.unsqueeze(1).unbind(dim=2)
    first, second = heads.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(heads.dtype)


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians a position, ``[head_dim / 2]`` fp32, falling.

    Source: Llama 3.1's ``apply_scaling``, in the form of transformers' ``rope_type`` llama3.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Llama3Scaling(factor, low, high, original_len):
            turns = original_len * plain / (2 * math.pi)
            # 0 up to `low` turns over the original length: stretched. 1 from `high` on: kept.
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return (1 - kept) * plain / factor + kept * plain
