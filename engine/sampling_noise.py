"""Noise that is a pure function of (seed, position, token id).

Nothing else enters: neither the other rows of a batch, nor the device, nor what was drawn before.
The hash works on integers below 2³², multiplied by constants below 2³¹, so that no product leaves
int64 and every device computes the same bits.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1


def row_keys(seeds_and_positions: Iterable[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Two words below 2³² for each ``(seed, position)``: ``[num_rows, 2]``.

    ``position`` is that of the token to be drawn, in its sequence.
    """
    keys = []
    for seed, position in seeds_and_positions:
        mixed = _mix_64(_mix_64(seed & _MASK_64) ^ position)
        keys.append((mixed >> 32, mixed & _MASK_32))
    return np.array(keys, dtype=np.int64).reshape(-1, 2)


def random_words(keys: Tensor, vocab_size: int) -> Tensor:
    """``[num_rows, vocab_size]`` int64, uniform over [0, 2³²), for ``keys`` of ``row_keys``."""
    token_ids = torch.arange(vocab_size, dtype=torch.int64, device=keys.device)
    first, second = keys[:, :1], keys[:, 1:]
    return _mix_32((_mix_32(token_ids ^ first) + second) & _MASK_32)


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """``[num_rows, vocab_size]`` float64: adding it to log weights, the argmax is a fair draw.

    ``-log(-log(u))``; finite, since ``u`` is at least 2⁻³³ away from 0 and from 1.
    """
    uniform = (random_words(keys, vocab_size).double() + 0.5) / (1 << 32)
    return -torch.log(-torch.log(uniform))


def _mix_64(word: int) -> int:
    """Source: SplitMix64 (Steele, Lea, Flood 2014), one step."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK_64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return word ^ (word >> 31)


def _mix_32(words: Tensor) -> Tensor:
    """A bijection of [0, 2³²). Source: the constants of Wellons' prospector, bias 0.107."""
    words = ((words ^ (words >> 16)) * 0x21F0AAAD) & _MASK_32
    words = ((words ^ (words >> 15)) * 0x735A2D97) & _MASK_32
    return words ^ (words >> 15)
