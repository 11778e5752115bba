"""The tiny model: a Llama with byte tokens, and its Hugging Face folder."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tools.tiny_model.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, save_tokenizer
from tools.tiny_model.training import Schedule

NUM_LAYERS = 3
HIDDEN_SIZE = 64
INTERMEDIATE_SIZE = 192
NUM_HEADS = 2
NUM_KV_HEADS = 1
HEAD_DIM = 32
ROPE_THETA = 10_000.0
NORM_EPSILON = 1e-5
MAX_POSITIONS = 4096

# A linear's path in its decoder layer -> (out_features, in_features).
LINEARS: dict[str, tuple[int, int]] = {
    "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
    "self_attn.o_proj": (HIDDEN_SIZE, NUM_HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
    "mlp.up_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
    "mlp.down_proj": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
}

SCHEDULE = Schedule(learning_rate=3e-3, num_steps=240, max_gradient_norm=1.0)

_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"

# A linear's path from the root, ``model.layers.0.self_attn.q_proj`` -> what is added to its weight.
Deltas = Mapping[str, Tensor]
_Rotation = tuple[Tensor, Tensor]


class TinyLlama:
    """A Llama in fp32 whose output head is its embedding. Owns its weights.

    ``weights`` are called as in the safetensors file and start out random.
    """

    def __init__(self, generator: torch.Generator) -> None:
        def random(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

        self.weights = {_EMBEDDING: random(VOCAB_SIZE, HIDDEN_SIZE)}
        for layer in range(NUM_LAYERS):
            prefix = f"model.layers.{layer}"
            for path, (rows, columns) in LINEARS.items():
                self.weights[f"{prefix}.{path}.weight"] = random(rows, columns)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.weights[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN_SIZE)
        self.weights[_FINAL_NORM] = torch.ones(HIDDEN_SIZE)
        self._set_trainable(True)

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.weights.values())

    def freeze(self) -> None:
        """Makes later gradients stop at the weights."""
        self._set_trainable(False)

    def predict(self, token_ids: Tensor, deltas: Deltas | None = None) -> Tensor:
        """Logits ``[batch, length, vocab]`` fp32 of right-padded ids ``[batch, length]``.

        Attention is causal, so what stands behind a row's end never reaches the row. ``deltas``
        are added to the weights they name.
        """
        rotation = _rotation(token_ids.shape[1])
        hidden = functional.embedding(token_ids, self.weights[_EMBEDDING])
        for layer in range(NUM_LAYERS):
            hidden = self._decoder_layer(f"model.layers.{layer}", hidden, rotation, deltas or {})
        return functional.linear(self._norm(_FINAL_NORM, hidden), self.weights[_EMBEDDING])

    def save(self, folder: Path) -> None:
        """Writes a whole model folder, tokenizer included, into the existing ``folder``."""
        (folder / "config.json").write_text(json.dumps(_config(), indent=2) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(_special_ids(), indent=2) + "\n")
        tensors = {name: weight.detach() for name, weight in self.weights.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(folder)

    def _set_trainable(self, trainable: bool) -> None:
        for weight in self.weights.values():
            weight.requires_grad_(trainable)

    def _decoder_layer(
        self, prefix: str, hidden: Tensor, rotation: _Rotation, deltas: Deltas
    ) -> Tensor:
        def linear(path: str, inputs: Tensor) -> Tensor:
            weight = self.weights[f"{prefix}.{path}.weight"]
            delta = deltas.get(f"{prefix}.{path}")
            return functional.linear(inputs, weight if delta is None else weight + delta)

        inputs = self._norm(f"{prefix}.input_layernorm.weight", hidden)
        query, key, value = (
            linear(f"self_attn.{name}", inputs)
            .view(*inputs.shape[:2], -1, HEAD_DIM)
            .transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, rotation), _rotate(key, rotation), value, is_causal=True, enable_gqa=True
        )
        hidden = hidden + linear("self_attn.o_proj", mixed.transpose(1, 2).flatten(2))

        inputs = self._norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        gate = functional.silu(linear("mlp.gate_proj", inputs))
        return hidden + linear("mlp.down_proj", gate * linear("mlp.up_proj", inputs))

    def _norm(self, name: str, inputs: Tensor) -> Tensor:
        return functional.rms_norm(inputs, (HIDDEN_SIZE,), self.weights[name], NORM_EPSILON)


def _rotation(length: int) -> _Rotation:
    """Cosine and sine ``[length, HEAD_DIM / 2]`` of the angle of each position and frequency."""
    frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def _rotate(heads: Tensor, rotation: _Rotation) -> Tensor:
    """Turns each pair ``(i, i + HEAD_DIM / 2)`` of ``heads`` by its position's angle."""
    cosine, sine = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        **_special_ids(),
    }
