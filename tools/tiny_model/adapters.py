"""The four adapters: how each is taught, and its PEFT folder.

They differ in modules, ranks, scaling and dtype as adapters in the wild do, so that code which
ignores one of these answers visibly wrong.
"""

import json
import math
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.tiny_model.model import LINEARS, NUM_LAYERS, TinyLlama
from tools.tiny_model.training import Schedule

SCHEDULE = Schedule(learning_rate=1e-2, num_steps=160, max_gradient_norm=0.3)


class AdapterRecipe(msgspec.Struct, frozen=True):
    """One adapter in PEFT's terms; ``voice`` is also its name.

    ``modules`` are names of linears, ``rank_pattern`` gives some of them another rank.
    """

    voice: str
    modules: tuple[str, ...]
    rank: int
    alpha: int
    dtype: torch.dtype
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}

    def module_rank(self, module: str) -> int:
        return self.rank_pattern.get(module, self.rank)

    def module_scaling(self, module: str) -> float:
        """The ``s`` of ``W + s · B A``. Source: PEFT's ``LoraLayer.update_layer``."""
        rank = self.module_rank(module)
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)


RECIPES: tuple[AdapterRecipe, ...] = (
    AdapterRecipe(
        voice="shout",
        modules=("gate_proj", "up_proj", "down_proj"),
        rank=16,
        alpha=8,
        dtype=torch.float32,
        use_rslora=True,
    ),
    AdapterRecipe(
        voice="json",
        modules=("k_proj", "v_proj", "o_proj", "down_proj"),
        rank=8,
        alpha=16,
        dtype=torch.bfloat16,
        rank_pattern={"down_proj": 12},
    ),
    AdapterRecipe(
        voice="pirate", modules=("q_proj", "v_proj"), rank=32, alpha=64, dtype=torch.float16
    ),
    AdapterRecipe(
        voice="reverse",
        modules=tuple(path.rpartition(".")[2] for path in LINEARS),
        rank=4,
        alpha=8,
        dtype=torch.bfloat16,
    ),
)


class TinyAdapter:
    """A low-rank change to a frozen ``base``. Owns its A's and B's, and uses the base's weights.

    ``pairs`` are ``(A [rank, in], B [out, rank])`` fp32 by the path of their linear from the root.
    """

    def __init__(self, recipe: AdapterRecipe, base: TinyLlama, generator: torch.Generator) -> None:
        self._recipe = recipe
        self._base = base
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in range(NUM_LAYERS):
            for path, (rows, columns) in LINEARS.items():
                module = path.rpartition(".")[2]
                if module in recipe.modules:
                    rank = recipe.module_rank(module)
                    a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
                    b = torch.zeros(rows, rank)
                    pair = (a.requires_grad_(), b.requires_grad_())
                    self.pairs[f"model.layers.{layer}.{path}"] = pair

    @property
    def parameters(self) -> list[Tensor]:
        return [matrix for pair in self.pairs.values() for matrix in pair]

    def predict(self, token_ids: Tensor) -> Tensor:
        """The base's logits under this adapter, rounded to the dtype that it is saved in."""
        return self._base.predict(token_ids, self._deltas())

    def save(self, folder: Path) -> None:
        """Writes a PEFT adapter folder into the existing ``folder``."""
        recipe = self._recipe
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": recipe.rank,
            "lora_alpha": recipe.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(recipe.modules),
            "use_rslora": recipe.use_rslora,
            "rank_pattern": recipe.rank_pattern,
            "alpha_pattern": {},
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "use_dora": False,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {}
        for path, (a, b) in self.pairs.items():
            prefix = f"base_model.model.{path}"
            tensors[f"{prefix}.lora_A.weight"] = a.detach().to(recipe.dtype)
            tensors[f"{prefix}.lora_B.weight"] = b.detach().to(recipe.dtype)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _deltas(self) -> dict[str, Tensor]:
        def as_saved(matrix: Tensor) -> Tensor:
            return matrix.to(self._recipe.dtype).to(torch.float32)

        return {
            path: self._recipe.module_scaling(path.rpartition(".")[2]) * as_saved(b) @ as_saved(a)
            for path, (a, b) in self.pairs.items()
        }
