"""Random configurations mean to the loader what PEFT makes of them on a model."""

import json
import warnings
from typing import Any

import peft
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer

from loader.peft_config import PeftConfig, parse_config
from tests.adapters import base_model

# Enough that one layer's index begins as another's does.
NUM_LAYERS = 12
_LAYERS = st.integers(0, NUM_LAYERS - 1)
_MODULES = st.sampled_from([shape.path for shape in base_model().linears])

NAMES = st.one_of(
    _MODULES,
    _MODULES.map(lambda module: module.split(".")[1]),
    st.tuples(_LAYERS, _MODULES).map(lambda pair: f"{pair[0]}.{pair[1]}"),
    st.tuples(_LAYERS, _MODULES).map(lambda pair: f"model.layers.{pair[0]}.{pair[1]}"),
    st.sampled_from(["_proj", "mlp.q_proj"]),
)
REGEXES = st.one_of(
    NAMES,
    NAMES.map(lambda name: ".*" + name.replace(".", r"\.")),
    st.tuples(NAMES, NAMES).map(lambda pair: f"(?:.+\\.)?({pair[0]}|{pair[1]})"),
    st.sampled_from(
        [
            r".*_proj",
            r".*\.(q|k|v|o)_proj$",
            r"^model\.layers\.1\d?\.(self_attn|mlp)\.[a-u]+_proj",
            r"(?:.*?(?:layers|blocks).*?(?:self_attn|mlp).*?(?:k_proj|v_proj|up_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:q_proj|k_proj))",
            r"layers\.[13-57]\..*_proj",
            r"layers\.\d{2}\.\w+\.\w+_proj",
            r".*[^v]_proj",
        ]
    ),
)
LAYERS_PATTERNS = st.sampled_from(
    ["layers", "model.layers", r"l\w+s", "(?:h|layers)", "h", "ayers"]
)
RANKS = st.integers(1, 9)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a configuration that PEFT would take."""
    fields: dict[str, Any] = {
        "r": draw(RANKS),
        "lora_alpha": draw(st.integers(-4, 32)),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(REGEXES, RANKS, max_size=3)),
        "alpha_pattern": draw(st.dictionaries(REGEXES, st.integers(0, 9), max_size=3)),
        "exclude_modules": draw(st.none() | st.lists(NAMES, max_size=2) | REGEXES),
    }
    names = st.lists(NAMES, min_size=1, max_size=4)
    fields["target_modules"] = draw(names | REGEXES | st.just("all-linear"))
    if isinstance(fields["target_modules"], list):
        layers = st.none() | _LAYERS | st.lists(_LAYERS, max_size=4)
        fields["layers_to_transform"] = draw(layers)
        if fields["layers_to_transform"] is not None:
            patterns = st.none() | LAYERS_PATTERNS | st.lists(LAYERS_PATTERNS, max_size=2)
            fields["layers_pattern"] = draw(patterns)
    return fields


def tiny_llama() -> Any:
    """A Llama of no weights."""
    config = transformers.LlamaConfig(
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=1,
        vocab_size=4,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def pairs_of_peft(config: peft.LoraConfig) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each module that PEFT puts a pair beside."""
    try:
        adapted = peft.get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    except ValueError:  # Nothing is targeted.
        return {}
    return {
        path.removeprefix("base_model.model."): (each.r["default"], each.scaling["default"])
        for path, each in adapted.named_modules()
        if isinstance(each, LoraLayer)
    }


def pairs_of(config: PeftConfig) -> dict[str, tuple[int, float]]:
    base = base_model(num_layers=NUM_LAYERS)
    paths = [
        (f"model.layers.{layer}.{shape.path}", layer)
        for layer in range(NUM_LAYERS)
        for shape in base.linears
    ]
    return {
        path: (config.rank_of(path), config.scaling_of(path))
        for path, layer in paths
        if config.is_targeted(path, layer)
    }


def as_saved(config: peft.LoraConfig) -> bytes:
    """The file that PEFT writes of a configuration."""
    fields = config.to_dict()
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields[name], set):
            fields[name] = sorted(fields[name])
    return json.dumps(fields).encode()


@settings(max_examples=60, deadline=None)
@given(fields=configurations())
def test_targets_ranks_and_scalings_are_those_of_peft(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        # Of patterns that match nothing.
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        before = as_saved(config)
        expected = pairs_of_peft(config)
    assert pairs_of(parse_config(before, "before")) == expected
    # PEFT writes a configuration after it was applied, with targets resolved to names.
    assert pairs_of(parse_config(as_saved(config), "after")) == expected
