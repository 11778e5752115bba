"""The decoder's elementwise operations as Triton kernels."""

from torch import Tensor

from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope_kv import rope_kv
from engine.kernels.silu_mul import silu_mul
from engine.kv_cache import KvDestination


class FusedOps:
    """``DecoderOps`` with one launch each, rounded to the model's dtype where transformers rounds.

    A token whose slot is negative is not stored.
    """

    def __init__(self, rms_norm_eps: float) -> None:
        self._eps = rms_norm_eps

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._eps)

    def add_rms_norm(self, residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return add_rms_norm(residual, x, weight, self._eps)

    def rotate_and_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        rotation: Tensor,
        destination: KvDestination,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, slots = destination.keys, destination.values, destination.slots
        rope_kv(qkv, rotation, norms, self._eps, keys, values, slots)
        num_kv_heads, head_dim = keys.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
        return query, key, value

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)
