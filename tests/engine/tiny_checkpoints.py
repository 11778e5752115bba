"""Small random models of every family, as Hugging Face folders, with PEFT adapters on top."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ipc.base_model import LINEAR_MODULES

VOCAB_SIZE = 96

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Family -> name of its configuration class in transformers, fields beside the shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_scaling": _LLAMA3_SCALING, "tie_word_embeddings": False}),
    "llama_biased": (
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "mistral": ("MistralConfig", {"head_dim": 24, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "rope_theta": 1e6}),
}

ALL_LINEARS = list(LINEAR_MODULES)
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank_1": {"r": 1, "lora_alpha": 1, "target_modules": ALL_LINEARS},
    "rank_3": {"r": 3, "lora_alpha": 4, "target_modules": ALL_LINEARS},
    "rank_8": {"r": 8, "lora_alpha": 8, "target_modules": ALL_LINEARS},
    "rank_8_twin": {"r": 8, "lora_alpha": 8, "target_modules": ALL_LINEARS},
    "rank_16": {
        "r": 16,
        "lora_alpha": 12,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 5},
        "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"],
    },
    "rank_64_qv": {"r": 64, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "rank_5_dora": {"r": 5, "lora_alpha": 5, "target_modules": ALL_LINEARS, "use_dora": True},
}


class Oracle:
    """What transformers and peft answer for one base model and all of its ``adapters``."""

    def __init__(
        self,
        family: str,
        folder: Path,
        adapters: dict[str, dict[str, Any]] = ADAPTERS,
        **shape: int,
    ) -> None:
        """Makes the model, whose ``shape`` may differ, and saves its base in ``folder``."""
        config_class, fields = FAMILIES[family]
        torch.manual_seed(sum(family.encode()))
        config = getattr(transformers, config_class)(**_SHAPE | shape, **fields)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                around = 1.0 if "norm" in name else 0.0
                parameter.normal_(around, 0.2)
        model.save_pretrained(folder)
        self._model = _with_adapters(model, adapters)
        self._logits: dict[tuple[str | None, tuple[int, ...]], Tensor] = {}

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """Linears that some adapter touches, by their path from the base model's root."""
        return {
            path.removeprefix("base_model.model."): module
            for path, module in self._model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def set_pairs(self, adapter: str, factors: Mapping[str, Tensor], scaling: float) -> None:
        """Gives an adapter other weights, all of them, by their names in PEFT's files."""
        for path, layer in self.layers.items():
            for factor, parts in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                values = factors[f"base_model.model.{path}.{factor}.weight"]
                parts[adapter].weight.data.copy_(values)
            layer.scaling[adapter] = scaling
        self._logits.clear()

    def save_adapters(self, folder: Path) -> None:
        """Writes a PEFT folder for each adapter, by its name."""
        self._model.save_pretrained(folder)

    def logits(self, adapter: str | None, token_ids: list[int]) -> Tensor:
        """``[num_tokens, vocab]`` of one sequence alone; ``adapter`` None is the base."""
        key = (adapter, tuple(token_ids))
        if key not in self._logits:
            self._logits[key] = self._compute(adapter, token_ids)
        return self._logits[key]

    def _compute(self, adapter: str | None, token_ids: list[int]) -> Tensor:
        batch = torch.tensor([token_ids])
        with torch.inference_mode():
            if adapter is None:
                with self._model.disable_adapter():
                    answer: Tensor = self._model(input_ids=batch).logits[0]
                return answer
            self._model.set_adapter(adapter)
            answer = self._model(input_ids=batch).logits[0]
            return answer


def _with_adapters(model: torch.nn.Module, adapters: dict[str, dict[str, Any]]) -> Any:
    configs = {
        name: LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **chosen)
        for name, chosen in adapters.items()
    }
    with warnings.catch_warnings():
        # Peft asks transformers for attributes that the latter is about to rename.
        warnings.simplefilter("ignore", FutureWarning)
        first, *others = configs
        adapted = get_peft_model(model, configs[first], first, autocast_adapter_dtype=False)
        for name in others:
            adapted.add_adapter(name, configs[name], autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                # Untrained, they scale nothing.
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
            elif parameter.requires_grad and name.endswith(".bias"):
                # As ``bias`` says which are trained.
                parameter.add_(torch.randn(parameter.shape) * 0.5)
    return adapted.eval()
