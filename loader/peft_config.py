"""Reads PEFT's ``adapter_config.json``: each field is honoured exactly, or refused by its name.

Every field that PEFT has is in one of three lists: ``HONOURED`` fields decide what is computed;
``TRAINING_ONLY`` fields have no effect on a trained adapter's output, each for its reason;
all others, those of ``REFUSED`` and those unknown here, are refused unless they say nothing: null,
false or empty.

Source: ``LoraConfig``, ``check_target_module_exists`` and ``get_pattern_key`` of PEFT 0.21.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from ipc.base_model import LINEAR_MODULES
from ipc.errors import AdapterInvalid
from loader import strict_json
from loader.strict_json import shorten

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"

HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "fan_in_fan_out",
    }
)

TRAINING_ONLY = {
    "auto_mapping": "names the Python class of the base, for loading it",
    "base_model_name_or_path": "names the base; what counts are the shapes, and they are checked",
    "corda_config": "has an effect only with init_lora_weights='corda', which is refused",
    "ensure_weight_tying": "concerns embeddings and heads, which are refused",
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
    "modules_to_save": "modules trained whole",
    "monteclora_config": "sampled weights",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "trained rows of the embedding",
    "use_bdlora": "block-diagonal factors",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}

# These leave the base's weights as they are. The others (pissa, olora, corda, loftq, lora_ga)
# change them, and PEFT writes ``true`` here when it converts such an adapter to a plain one.
_INITS_OF_A_PLAIN_BASE = ("gaussian", "eva", "orthogonal", "mica")

# What a key of rank_pattern and alpha_pattern may be: a module's name or path, with its dots
# escaped or not, and the anchor that PEFT's own documentation uses. As a regular expression it
# has no repetition, so that a match takes linear time.
_PLAIN_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.)+")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What an adapter's configuration says of each module of its base.

    A module is given by its path from the base model's root: ``model.layers.3.self_attn.q_proj``.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: tuple[str, ...]
    exclude_modules: tuple[str, ...]
    layers_to_transform: frozenset[int] | None

    def is_targeted(self, path: str, layer: int) -> bool:
        """Whether PEFT would put a low-rank pair beside the module at ``path`` of ``layer``."""
        if _is_named(path, self.exclude_modules):
            return False
        if path in self.target_modules:
            return True
        in_layers = self.layers_to_transform is None or layer in self.layers_to_transform
        return in_layers and _is_named(path, self.target_modules)

    def rank_of(self, path: str) -> int:
        """The rank that the module's pair must have."""
        return _first_match(self.rank_pattern, path, self.rank)

    def scaling_of(self, path: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
        rank = self.rank_of(path)
        alpha = _first_match(self.alpha_pattern, path, self.alpha)
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
    reader.one_of("bias", (None, "none"))
    reader.one_of("fan_in_fan_out", (None, False))
    reader.init_lora_weights()
    return PeftConfig(
        rank=reader.rank("r", fields.get("r")),
        alpha=reader.alpha("lora_alpha", fields.get("lora_alpha")),
        use_rslora=reader.one_of("use_rslora", (None, False, True)) is True,
        rank_pattern={
            key: reader.rank(f"rank_pattern[{shorten(key)}]", value)
            for key, value in reader.pattern("rank_pattern").items()
        },
        alpha_pattern={
            key: reader.alpha(f"alpha_pattern[{shorten(key)}]", value)
            for key, value in reader.pattern("alpha_pattern").items()
        },
        target_modules=reader.target_modules(),
        exclude_modules=reader.exclude_modules(),
        layers_to_transform=reader.layers_to_transform(),
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

    def pattern(self, name: str) -> dict[str, Any]:
        value = self._fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refusal(name, "an object from module names to numbers")
        for key in value:
            if _PLAIN_PATTERN.fullmatch(key) is None:
                raise AdapterInvalid(
                    f"{self._where}: {name} has the key {shorten(key)}, expected a module's name"
                    " or path; other regular expressions can not be served",
                    param=name,
                )
        return value

    def target_modules(self) -> tuple[str, ...]:
        value = self._fields.get("target_modules")
        if isinstance(value, str) and value.lower() == ALL_LINEAR:
            if not _says_nothing(self._fields.get("layers_to_transform")):
                raise self.refusal("layers_to_transform", f"null beside {ALL_LINEAR!r}, as in PEFT")
            return LINEAR_MODULES
        if isinstance(value, str):
            raise self.refusal(
                "target_modules",
                f"a list of module names or {ALL_LINEAR!r}; regular expressions can not be served",
            )
        return self._names("target_modules", value, "a list of module names")

    def exclude_modules(self) -> tuple[str, ...]:
        value = self._fields.get("exclude_modules")
        if _says_nothing(value):
            return ()
        expected = "a list of module names; regular expressions can not be served"
        return self._names("exclude_modules", value, expected)

    def layers_to_transform(self) -> frozenset[int] | None:
        pattern = self._fields.get("layers_pattern")
        if not _says_nothing(pattern) and pattern not in ("layers", ["layers"]):
            raise self.refusal("layers_pattern", "'layers'")
        value = self._fields.get("layers_to_transform")
        if value is None or value == []:
            return None
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int and layer >= 0 for layer in layers):
            raise self.refusal("layers_to_transform", "a layer's index or a list of them")
        return frozenset(layers)

    def _names(self, name: str, value: object, expected: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(name, expected)
        return tuple(value)


def _shorten_name(name: str) -> str:
    """A field's name as a message may carry it."""
    return name if name.isprintable() and len(name) <= 120 else shorten(name)


def _says_nothing(value: object) -> bool:
    return value is None or value is False or value in ([], {}, "")


def _is_named(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _first_match(patterns: dict[str, Value], path: str, default: Value) -> Value:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
