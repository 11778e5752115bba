"""The memory of keys and values, in blocks that a block table strings together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import Device, torch_dtype
from engine.models.config import ModelConfig
from ipc.base_model import DType


@dataclass(frozen=True, slots=True)
class KvDestination:
    """Where a step's keys and values of one layer belong: those of token t in ``slots[t]``.

    ``keys`` and ``values`` are ``[num_slots, num_kv_heads, head_dim]``, contiguous.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor


class KvCache:
    """Keys and values of ``num_blocks`` blocks; owns their memory, which begins undefined.

    ``keys[layer]`` and ``values[layer]`` are ``[num_blocks, block_size, num_kv_heads, head_dim]``
    in the model's dtype, contiguous. The *slot* of a token is ``block * block_size + offset``.
    Whoever reads must read only slots that were written for the same sequence: what lies in the
    rest of a block may be another's, or not a number.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: DType, device: Device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (
            2,
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
        )
        memory = torch.empty(shape, dtype=torch_dtype(dtype), device=device.torch_device)
        self.keys: tuple[Tensor, ...] = memory[0].unbind(0)
        self.values: tuple[Tensor, ...] = memory[1].unbind(0)
        # The same memory by slot: [num_slots, num_kv_heads, head_dim].
        self.keys_by_slot = tuple(keys.flatten(0, 1) for keys in self.keys)
        self.values_by_slot = tuple(values.flatten(0, 1) for values in self.values)

    def destination(self, layer: int, slots: Tensor) -> KvDestination:
        """The layer's memory with the slots ``[num_tokens]`` of a step's tokens."""
        return KvDestination(self.keys_by_slot[layer], self.values_by_slot[layer], slots)
