"""Reads PEFT's ``adapter_config.json``: each field is honoured exactly, or refused by its name.

Every field that PEFT has is in one of three lists: ``HONOURED`` fields decide what is computed;
``TRAINING_ONLY`` fields have no effect on a trained adapter's output, each for its reason;
all others, those of ``REFUSED`` and those unknown here, are refused unless they say nothing: null,
false or empty.

Source: ``LoraConfig`` of PEFT 0.21, whose ``__post_init__`` says what contradicts what.
"""

import math
from dataclasses import dataclass
from typing import Any

from ipc.base_model import EMBED_PATH, HEAD_PATH, LINEAR_MODULES
from ipc.errors import AdapterInvalid
from loader import strict_json
from loader.module_choice import (
    LayerChoice,
    MatchedModules,
    ModuleChoice,
    NamedModules,
    PatternTable,
)
from loader.path_automaton import Effort
from loader.strict_json import shorten

ALL_LINEAR = "all-linear"

HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "fan_in_fan_out",
        "modules_to_save",
        "ensure_weight_tying",
    }
)

TRAINING_ONLY = {
    "auto_mapping": "names the Python class of the base, for loading it",
    "base_model_name_or_path": "names the base; what counts are the shapes, and they are checked",
    "corda_config": "has an effect only with init_lora_weights='corda', which is refused",
    "eva_config": "how A was initialised; the base stays as it was",
    "inference_mode": "whether gradients are kept",
    "loftq_config": "has an effect only with init_lora_weights='loftq', which is refused",
    "lora_dropout": "dropout is off outside of training",
    "lora_ga_config": "has an effect only with init_lora_weights='lora_ga', which is refused",
    "megatron_core": "has an effect only with megatron_config, which is refused",
    "peft_version": "which PEFT wrote the file",
    "qalora_group_size": "has an effect only with use_qalora, which is refused",
    "revision": "names a version of the base",
    "runtime_config": "how PEFT runs, not what it computes",
    "velora_config": "replaces the backward pass alone",
}

REFUSED: dict[str, str] = {
    "alora_invocation_tokens": "an adapter that is active from a token on",
    "arrow_config": "routing between adapters",
    "kasa_config": "a changed base weight",
    "layer_replication": "a base with repeated layers",
    "lora_bias": "a bias of B",
    "megatron_config": "parallel layers of Megatron",
    "monteclora_config": "sampled weights",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "trained rows of the embedding",
    "use_bdlora": "block-diagonal factors",
    "use_qalora": "QALoRA",
}

# Ends of paths as ``modules_to_save`` has them, and the modules that they mean.
_SAVED_PATHS = {
    "embed_tokens": EMBED_PATH,
    EMBED_PATH: EMBED_PATH,
    HEAD_PATH: HEAD_PATH,
}

# These leave the base's weights as they are. The others (pissa, olora, corda, loftq, lora_ga)
# change them, and PEFT writes ``true`` here when it converts such an adapter to a plain one.
_INITS_OF_A_PLAIN_BASE = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What an adapter's configuration says of each module of its base.

    A module is given by its path from the base model's root: ``model.layers.3.self_attn.q_proj``.
    ``saved_paths`` are those of ``modules_to_save``: of embedding and head alone.
    """

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    target_modules: NamedModules | MatchedModules
    exclude_modules: ModuleChoice
    layers_to_transform: LayerChoice | None
    bias: str
    saved_paths: frozenset[str] = frozenset()
    ensure_weight_tying: bool = False

    def is_targeted(self, path: str, layer: int | None) -> bool:
        """Whether PEFT would put a low-rank pair beside the module at ``path``.

        ``layer`` is its decoder layer's index, None where it is in none. Raises
        ``AdapterInvalid``, as the other methods do, where patterns take too long to match.
        """
        if self.exclude_modules.includes(path) or not self.target_modules.includes(path):
            return False
        if self.layers_to_transform is None:
            return True
        if isinstance(self.target_modules, NamedModules) and self.target_modules.has_path(path):
            return True
        return layer is not None and self.layers_to_transform.includes(path, layer)

    def rank_of(self, path: str) -> int:
        """The rank that the module's pair must have."""
        return self.rank_pattern.get(path, self.rank)

    def scaling_of(self, path: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
        rank = self.rank_of(path)
        alpha = self.alpha_pattern.get(path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(payload: bytes, where: str) -> PeftConfig:
    """The configuration that ``payload`` spells; ``where`` names it in messages.

    Raises:
        AdapterInvalid: the configuration asks for anything that would not be honoured exactly.
    """
    fields = strict_json.parse(payload, where)
    if not isinstance(fields, dict):
        raise AdapterInvalid(f"{where} is not a JSON object: {shorten(fields)}")
    reader = _Fields(fields, where)
    for name, value in fields.items():
        if name not in HONOURED and name not in TRAINING_ONLY and not _says_nothing(value):
            why = REFUSED.get(name, "a field unknown to this server")
            raise reader.refusal(name, f"null, false or empty: {why} can not be served")
    reader.one_of("peft_type", ("LORA",))
    reader.one_of("task_type", (None, "CAUSAL_LM"))
    # True is for bases of Conv1D; beside a Linear, PEFT sets it to false.
    reader.one_of("fan_in_fan_out", (None, False, True))
    reader.init_lora_weights()
    effort = Effort()
    return PeftConfig(
        rank=reader.rank("r", fields.get("r")),
        alpha=reader.alpha("lora_alpha", fields.get("lora_alpha")),
        use_rslora=reader.one_of("use_rslora", (None, False, True)) is True,
        use_dora=reader.one_of("use_dora", (None, False, True)) is True,
        rank_pattern=PatternTable.of(where, "rank_pattern", reader.ranks(), effort),
        alpha_pattern=PatternTable.of(where, "alpha_pattern", reader.alphas(), effort),
        target_modules=reader.target_modules(effort),
        exclude_modules=reader.exclude_modules(effort),
        layers_to_transform=reader.layers_to_transform(effort),
        # Which of the base's biases were trained: where it has none, there is nothing to it.
        bias=str(reader.one_of("bias", (None, "none", "all", "lora_only")) or "none"),
        saved_paths=reader.saved_paths(),
        ensure_weight_tying=reader.one_of("ensure_weight_tying", (None, False, True)) is True,
    )


class _Fields:
    """The honoured fields of one configuration, each read by its own rule."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self._fields = fields
        self._where = where

    def refusal(self, name: str, expected: str, got: object = None) -> AdapterInvalid:
        """The error for field ``name``; ``got`` is its value unless it is given."""
        value = self._fields.get(name) if got is None else got
        return AdapterInvalid(
            f"{self._where}: {_shorten_name(name)} is {shorten(value)}, expected {expected}",
            param=name,
        )

    def one_of(self, name: str, allowed: tuple[object, ...]) -> object:
        value = self._fields.get(name)
        # 1 == True to Python, but a file that says 1 does not say true.
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            raise self.refusal(name, " or ".join(repr(choice) for choice in allowed))
        return value

    def init_lora_weights(self) -> None:
        value = self._fields.get("init_lora_weights")
        if value is None or isinstance(value, bool):
            return
        if isinstance(value, str) and value.lower() in _INITS_OF_A_PLAIN_BASE:
            return
        raise self.refusal(
            "init_lora_weights",
            f"true, false or one of {', '.join(_INITS_OF_A_PLAIN_BASE)}: an adapter whose"
            " initialisation changed the base must be converted when it is saved"
            " (path_initial_model_for_weight_conversion)",
        )

    def rank(self, name: str, value: object) -> int:
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.refusal(name, "a whole number greater than 0", value)
        return value

    def alpha(self, name: str, value: object) -> float:
        # Beyond 2**64 nothing is a scaling, and a far greater int is not even a float.
        if type(value) not in (int, float) or not abs(value) < 2.0**64:  # type: ignore[arg-type]
            raise self.refusal(name, "a number of magnitude below 2**64", value)
        return float(value)  # type: ignore[arg-type]

    def ranks(self) -> dict[str, int]:
        return {
            key: self.rank(f"rank_pattern[{shorten(key)}]", value)
            for key, value in self._object("rank_pattern").items()
        }

    def alphas(self) -> dict[str, float]:
        return {
            key: self.alpha(f"alpha_pattern[{shorten(key)}]", value)
            for key, value in self._object("alpha_pattern").items()
        }

    def target_modules(self, effort: Effort) -> NamedModules | MatchedModules:
        value = self._fields.get("target_modules")
        if isinstance(value, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if not _says_nothing(self._fields.get(name)):
                    expected = f"null beside target_modules {shorten(value)}, as in PEFT"
                    raise self.refusal(name, expected)
            if value.lower() == ALL_LINEAR:
                return NamedModules(frozenset(LINEAR_MODULES))
        return self._modules("target_modules", effort, f" or {ALL_LINEAR!r}")

    def exclude_modules(self, effort: Effort) -> ModuleChoice:
        if _says_nothing(self._fields.get("exclude_modules")):
            return NamedModules(frozenset())
        return self._modules("exclude_modules", effort)

    def layers_to_transform(self, effort: Effort) -> LayerChoice | None:
        patterns = self._layers_patterns()
        value = self._fields.get("layers_to_transform")
        if value is None and patterns:
            raise self.refusal("layers_pattern", "null without layers_to_transform, as in PEFT")
        if value is None or value == []:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int and layer >= 0 for layer in layers):
            raise self.refusal("layers_to_transform", "a layer's index or a list of them")
        return LayerChoice.of(self._where, frozenset(layers), patterns, effort)

    def saved_paths(self) -> frozenset[str]:
        value = self._fields.get("modules_to_save")
        if _says_nothing(value):
            return frozenset()
        names: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) and name in _SAVED_PATHS for name in names):
            raise self.refusal("modules_to_save", f"null or some of {', '.join(_SAVED_PATHS)}")
        return frozenset(_SAVED_PATHS[name] for name in names)

    def _layers_patterns(self) -> tuple[str, ...]:
        value = self._fields.get("layers_pattern")
        if _says_nothing(value):
            return ()
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(each, str) for each in patterns):
            raise self.refusal("layers_pattern", "a name of layers or a list of them")
        return tuple(patterns)

    def _modules(
        self, name: str, effort: Effort, or_else: str = ""
    ) -> NamedModules | MatchedModules:
        value = self._fields.get(name)
        if isinstance(value, str):
            return MatchedModules.of(self._where, name, value, effort)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(name, f"a list of module names, a regular expression{or_else}")
        return NamedModules(frozenset(value))

    def _object(self, name: str) -> dict[str, Any]:
        value = self._fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refusal(name, "an object from module names to numbers")
        return value


def _shorten_name(name: str) -> str:
    """A field's name as a message may carry it."""
    return name if name.isprintable() and len(name) <= 120 else shorten(name)


def _says_nothing(value: object) -> bool:
    return value is None or value is False or value in ([], {}, "")
