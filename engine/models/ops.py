"""What a decoder computes, as operations that a device has fast ways for."""

from typing import Protocol

from torch import Tensor
from torch.nn import functional

from engine.device import CudaDevice, Device
from engine.kv_cache import KvDestination
from engine.lora.delta import Delta, Projected
from engine.models.rotary import rotate


class DecoderOps(Protocol):
    """The operations of a decoder with one epsilon of its RMS norms.

    Tensors are in the model's dtype, one row a token, contiguous.
    """

    @property
    def rms_norm_eps(self) -> float:
        """What every norm adds to the mean of squares."""
        ...

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_beside: bool = False
    ) -> Tensor:
        """``x Wᵀ + bias`` for ``weight`` ``[out, in]``; see ``Product`` for ``is_beside``."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """``weight · x / sqrt(mean(x²) + eps)`` of each row; both ``[..., width]``."""
        ...

    def add(self, residual: Tensor, x: Tensor, delta: Delta | None = None) -> Tensor:
        """``residual += x`` in place, and returned; first ``x`` gets its delta."""
        ...

    def add_rms_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, delta: Delta | None = None
    ) -> Tensor:
        """``residual += x`` in place, then ``rms_norm`` of the sum; first ``x`` gets its delta."""
        ...

    def rotate_and_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        rotation: Tensor,
        destination: KvDestination,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of each token, ready for attention; key and value are stored.

        ``qkv`` is ``[num_tokens, (num_heads + 2 num_kv_heads) * head_dim]`` and may be overwritten;
        ``rotation`` ``[num_tokens, 2, head_dim / 2]`` fp32, rows of ``rotary_table``; ``norms`` the
        weights ``[head_dim]`` of the queries' and the keys' head norms, which come first. The
        results are ``[num_tokens, heads, head_dim]``; their rows may lie apart.
        """
        ...

    def silu_mul(self, gate_up: Tensor, delta: Delta | None = None) -> Tensor:
        """``silu(gate) · up`` for rows of gate and up side by side; first these get their delta."""
        ...


def open_ops(device: Device, rms_norm_eps: float) -> DecoderOps:
    """The fastest operations that ``device`` has."""
    if not isinstance(device, CudaDevice):
        return TorchOps(rms_norm_eps)
    # Only a GPU needs Triton.
    from engine.cuda_ops import FusedOps

    return FusedOps(rms_norm_eps, device.torch_device)


class TorchOps:
    """Plain torch, on any device: what fused operations are compared with."""

    def __init__(self, rms_norm_eps: float) -> None:
        self._eps = rms_norm_eps

    @property
    def rms_norm_eps(self) -> float:
        return self._eps

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, is_beside: bool = False
    ) -> Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self._eps)

    def add(self, residual: Tensor, x: Tensor, delta: Delta | None = None) -> Tensor:
        return residual.add_(Projected(x, delta).total())

    def add_rms_norm(
        self, residual: Tensor, x: Tensor, weight: Tensor, delta: Delta | None = None
    ) -> Tensor:
        return self.rms_norm(self.add(residual, x, delta), weight)

    def rotate_and_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        rotation: Tensor,
        destination: KvDestination,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_kv_heads, head_dim = destination.keys.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
        if norms is not None:
            query, key = self.rms_norm(query, norms[0]), self.rms_norm(key, norms[1])
        query, key = rotate(query, rotation), rotate(key, rotation)
        destination.keys.index_copy_(0, destination.slots, key)
        destination.values.index_copy_(0, destination.slots, value)
        return query, key, value

    def silu_mul(self, gate_up: Tensor, delta: Delta | None = None) -> Tensor:
        gate, up = Projected(gate_up, delta).total().chunk(2, dim=-1)
        return functional.silu(gate) * up
