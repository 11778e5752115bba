"""The decoder of Llama, Mistral, Qwen2 and Qwen3: one implementation, driven by ``ModelConfig``.

A layer is ``h += O(attention(R(N(Q)), R(N(K)), V))`` of ``rms_norm(h)`` and then
``h += Down(silu(Gate) · Up)`` of ``rms_norm(h)``; R is the rotary embedding, N the head norm of
Qwen3. Q, K and V are one matrix product, Gate and Up another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from engine.attention import AttentionStep
from engine.device import Device, torch_dtype
from engine.lora.delta import Projected
from engine.lora.linear import LoraStep, ModuleColumns
from engine.models.config import ModelConfig
from engine.models.ops import DecoderOps, open_ops
from engine.models.rotary import rotary_table
from ipc.base_model import DType

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Linear:
    """``weight`` ``[out, in]``, ``bias`` ``[out]``; ``modules`` lie side by side in ``out``."""

    modules: tuple[ModuleColumns, ...]
    weight: Tensor
    bias: Tensor | None

    def apply(self, layer: int, x: Tensor, lora: LoraStep, ops: DecoderOps) -> Projected:
        product = partial(ops.linear, x, self.weight, self.bias)
        return lora.project(layer, self.modules, x, product)

    def name_tensors(self, prefix: str) -> dict[str, Tensor]:
        named = {}
        for module in self.modules:
            columns = slice(module.start, module.stop)
            named[f"{prefix}.{module.module}.weight"] = self.weight[columns]
            if self.bias is not None:
                named[f"{prefix}.{module.module}.bias"] = self.bias[columns]
        return named


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer's weights; the head norms are ``[head_dim]``."""

    input_norm: Tensor
    qkv: _Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: _Linear
    post_attention_norm: Tensor
    gate_up: _Linear
    down: _Linear

    def name_tensors(self, prefix: str) -> dict[str, Tensor]:
        named = {
            f"{prefix}.input_layernorm.weight": self.input_norm,
            f"{prefix}.post_attention_layernorm.weight": self.post_attention_norm,
        }
        if self.query_norm is not None and self.key_norm is not None:
            named[f"{prefix}.self_attn.q_norm.weight"] = self.query_norm
            named[f"{prefix}.self_attn.k_norm.weight"] = self.key_norm
        for linear in (self.qkv, self.output):
            named |= linear.name_tensors(f"{prefix}.self_attn")
        for linear in (self.gate_up, self.down):
            named |= linear.name_tensors(f"{prefix}.mlp")
        return named


def _nothing() -> None:
    pass


def _unchanged(x: Tensor, logits: Tensor) -> None:
    pass


class Decoder:
    """Owns a model's weights, which begin undefined: ``checkpoint_tensors`` says where they go.

    A step is ``embed``, ``run_layers`` over all layers at once or over one range after another,
    with the ``rotation`` of its rows, then ``logits`` of those that are wanted. The caller gives
    the stream and the grad mode.
    """

    def __init__(
        self, config: ModelConfig, dtype: DType, device: Device, ops: DecoderOps | None = None
    ) -> None:
        """``ops`` None stands for those of the device."""
        self.config = config
        self.dtype = dtype
        self._ops = ops or open_ops(device, config.rms_norm_eps)
        self._device = device.torch_device
        self._embedding = self._empty(config.vocab_size, config.hidden_size)
        self._layers = [self._layer() for _ in range(config.num_layers)]
        self._norm = self._empty(config.hidden_size)
        self._head = self._embedding
        if not config.tie_word_embeddings:
            self._head = self._empty(config.vocab_size, config.hidden_size)
        self._rotary_table = rotary_table(
            config.rope, config.head_dim, config.max_model_len, self._device
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights and of hidden states."""
        return self._embedding.dtype

    @property
    def num_bytes(self) -> int:
        """Device memory of the weights."""
        tensors = self.checkpoint_tensors().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Every weight by its name in a checkpoint, as the view to fill."""
        named = {_EMBEDDING: self._embedding, "model.norm.weight": self._norm}
        if not self.config.tie_word_embeddings:
            named[_HEAD] = self._head
        for index, layer in enumerate(self._layers):
            named |= layer.name_tensors(f"model.layers.{index}")
        return named

    def checkpoint_aliases(self) -> dict[str, str]:
        """Names that a checkpoint may hold as well, each with the name that it must equal."""
        return {_HEAD: _EMBEDDING} if self.config.tie_word_embeddings else {}

    def embed(self, token_ids: Tensor) -> Tensor:
        """``[num_tokens, hidden]`` for ``token_ids`` ``[num_tokens]`` int64."""
        return functional.embedding(token_ids, self._embedding)

    def rotation(self, positions: Tensor) -> Tensor:
        """What ``run_layers`` turns rows by that stand at ``positions`` ``[num_tokens]``, integers.

        ``[num_tokens, 2, head_dim / 2]`` fp32, see ``engine.models.rotary``.
        """
        return self._rotary_table[positions]

    def run_layers(
        self,
        layers: range,
        hidden: Tensor,
        rotation: Tensor,
        attention: AttentionStep,
        lora: LoraStep,
        between: Callable[[], None] = _nothing,
    ) -> Tensor:
        """``hidden`` ``[num_tokens, hidden]`` behind the last of ``layers``, computed in place.

        ``rotation`` is that of its rows. ``between`` is called when a layer has been given to the
        device.
        """
        ops = self._ops
        down = None
        for index in layers:
            layer = self._layers[index]
            if down is None:
                x = ops.rms_norm(hidden, layer.input_norm)
            else:
                x = ops.add_rms_norm(hidden, down.out, layer.input_norm, down.delta)
            qkv = layer.qkv.apply(index, x, lora, ops)
            mixed = self._attend(index, layer, qkv, rotation, attention)
            output = layer.output.apply(index, mixed, lora, ops)
            x = ops.add_rms_norm(hidden, output.out, layer.post_attention_norm, output.delta)
            gate_up = layer.gate_up.apply(index, x, lora, ops)
            x = ops.silu_mul(gate_up.out, gate_up.delta)
            down = layer.down.apply(index, x, lora, ops)
            between()
        return hidden if down is None else ops.add(hidden, down.out, down.delta)

    def logits(
        self, hidden: Tensor, change: Callable[[Tensor, Tensor], None] = _unchanged
    ) -> Tensor:
        """``[num_rows, vocab]`` for rows ``[num_rows, hidden]`` behind the last layer.

        ``change`` is given what the head takes in, ``[num_rows, hidden]``, and the logits, which it
        may change in place.
        """
        x = self._ops.rms_norm(hidden, self._norm)
        logits = self._ops.linear(x, self._head)
        change(x, logits)
        return logits

    def _attend(
        self, index: int, layer: _Layer, qkv: Projected, rotation: Tensor, attention: AttentionStep
    ) -> Tensor:
        norms = None
        if layer.query_norm is not None and layer.key_norm is not None:
            norms = layer.query_norm, layer.key_norm
        attended = attention.attend_projected(index, qkv.out, norms, rotation, self._ops, qkv.delta)
        return attended.flatten(1)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch_dtype(self.dtype), device=self._device)

    def _layer(self) -> _Layer:
        config = self.config
        hidden = config.hidden_size
        query, kv, inner = config.query_size, config.kv_size, config.intermediate_size
        head_norm = config.head_dim if config.qk_norm else None
        return _Layer(
            input_norm=self._empty(hidden),
            qkv=self._linear(hidden, config.qkv_bias, q_proj=query, k_proj=kv, v_proj=kv),
            query_norm=None if head_norm is None else self._empty(head_norm),
            key_norm=None if head_norm is None else self._empty(head_norm),
            output=self._linear(query, config.o_bias, o_proj=hidden),
            post_attention_norm=self._empty(hidden),
            gate_up=self._linear(hidden, config.mlp_bias, gate_proj=inner, up_proj=inner),
            down=self._linear(inner, config.mlp_bias, down_proj=hidden),
        )

    def _linear(self, in_features: int, has_bias: bool, **out_features: int) -> _Linear:
        modules = []
        start = 0
        for name, width in out_features.items():
            modules.append(ModuleColumns(name, start, start + width))
            start += width
        return _Linear(
            tuple(modules),
            self._empty(start, in_features),
            self._empty(start) if has_bias else None,
        )
