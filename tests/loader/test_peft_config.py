"""Each field of a PEFT configuration is honoured, has no effect, or is refused by its name."""

import dataclasses
import json
import math
import random

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ipc.errors import AdapterInvalid
from loader.peft_config import HONOURED, REFUSED, TRAINING_ONLY, PeftConfig, parse_config
from tests.adapters import config_fields

WHERE = "adapter_config.json"
PATHS = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10, 11)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
]


def parse(**fields: object) -> PeftConfig:
    return parse_config(json.dumps(config_fields(**fields)).encode(), WHERE)  # type: ignore[arg-type]


def refusal(**fields: object) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        parse(**fields)
    return caught.value.message


def test_every_field_of_peft_is_in_one_list() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = [*HONOURED, *TRAINING_ONLY, *REFUSED]
    assert fields == set(known) & fields, "PEFT has a field that was never thought about"
    assert len(known) == len(set(known))


def test_scaling_is_alpha_over_rank() -> None:
    assert parse(rank=4, lora_alpha=6).scaling_of(PATHS[0]) == 1.5


def test_scaling_of_rslora_is_alpha_over_the_root_of_the_rank() -> None:
    config = parse(rank=4, lora_alpha=6, use_rslora=True)
    assert config.scaling_of(PATHS[0]) == 6 / math.sqrt(4)


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2},
        {"self_attn.q_proj": 2, "q_proj": 3},
        {"layers.1.self_attn.q_proj": 2},
        {r"layers\.1\.self_attn\.q_proj": 2},
        {"1.self_attn.q_proj": 5, "model.layers.11.self_attn.v_proj": 7},
        {"^model.layers.0.self_attn.q_proj": 2},
        {"layers..0.self_attn.q_proj": 2},
        {"proj": 2},
        {r"[qk]_proj": 2, r"layers\.\d+\.mlp\..*": 3, ".*": 5},
        {r"layers\.1.?\.self_attn\.(q|v)_proj$": 2, r"\bup_proj": 3},
        {},
        None,
    ],
)
def test_patterns_match_as_in_peft(pattern: dict[str, int] | None) -> None:
    config = parse(rank=8, lora_alpha=16, rank_pattern=pattern, alpha_pattern=pattern)
    for path in PATHS:
        expected = (pattern or {}).get(get_pattern_key(list(pattern or {}), path))
        assert config.rank_of(path) == (expected or 8)
        assert config.scaling_of(path) == (expected or 16) / (expected or 8)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj", "self_attn.v_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": [PATHS[0], "v_proj"], "layers_to_transform": [10]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"q_proj"},
        {"target_modules": r"model\.layers\.1\d\..*", "exclude_modules": r".*\.v_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "l.*s"]},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "model.layers"},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "ayers"},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "model"},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layer"},
        {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": r"layers\.1"},
        {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "(?:a|layers)"},
    ],
)
def test_modules_are_targeted_as_in_peft(fields: dict[str, object]) -> None:
    config = parse(**fields)
    oracle = LoraConfig(**fields)
    if isinstance(oracle.target_modules, set):
        oracle.target_modules = sorted(oracle.target_modules)
    for path in PATHS:
        # A match where the modules are given by a pattern, an object that is false if excluded.
        expected = bool(check_target_module_exists(oracle, path))
        assert config.is_targeted(path, int(path.split(".")[2])) is expected, path


@pytest.mark.parametrize("bias", ["none", "all", "lora_only", None])
def test_biases_are_left_to_the_tensors(bias: str | None) -> None:
    assert parse(bias=bias).bias == (bias or "none")


def test_a_layer_of_no_decoder_layer_is_targeted_only_by_its_whole_path() -> None:
    targets = ["lm_head", "embed_tokens"]
    config = parse(target_modules=targets, layers_to_transform=[0])
    assert config.is_targeted("lm_head", None)
    assert not config.is_targeted("model.embed_tokens", None)
    assert parse(target_modules=targets).is_targeted("model.embed_tokens", None)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_takes_too_long_is_refused_by_its_field(name: str) -> None:
    slow = "|".join([".*"] * 5_000)
    config = parse(**{name: {slow: 1} if name == "rank_pattern" else slow})
    with pytest.raises(AdapterInvalid) as caught:
        for layer in range(128):
            path = f"model.layers.{layer}.self_attn.q_proj"
            config.is_targeted(path, layer)
            config.rank_of(path)
    expected = f"{WHERE}: {name}: this regular expression can not be served: it takes too long"
    assert caught.value.message.startswith(expected)


def test_a_pattern_of_absurd_length_is_refused_unread() -> None:
    expected = "target_modules: this regular expression can not be served: it takes too long"
    assert expected in refusal(target_modules="[" + "a" * 1_000_000)


def test_all_linear_targets_every_linear_layer() -> None:
    config = parse(target_modules="all-linear")
    assert all(config.is_targeted(path, 0) for path in PATHS)
    assert not config.is_targeted("lm_head", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": "yes"}, "use_dora is 'yes', expected None or False or True"),
        (
            {"modules_to_save": ["lm_head", "norm"]},
            "modules_to_save is ['lm_head', 'norm'], expected null or some of embed_tokens, model.",
        ),
        ({"modules_to_save": [None]}, "modules_to_save is [None], expected null or some of embed"),
        ({"ensure_weight_tying": 1}, "ensure_weight_tying is 1, expected None or False or True"),
        ({"bias": "some"}, "bias is 'some', expected None or 'none' or 'all' or 'lora_only'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out is 1, expected None or False or True"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', expected None or 'CAUSAL_LM'"),
        (
            {"target_modules": "(?=.*)q"},
            "target_modules: this regular expression can not be served: '(?=.*)q' has a group of",
        ),
        (
            {"target_modules": 3},
            "is 3, expected a list of module names, a regular expression or 'a",
        ),
        ({"target_modules": None}, "target_modules is None, expected a list of module names"),
        ({"target_modules": ["q", 1]}, "target_modules is ['q', 1], expected a list of module"),
        ({"exclude_modules": "a**"}, "exclude_modules: this regular expression can not be served"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules is {'a': 1}, expected a list of module"),
        ({"rank_pattern": {"a)|(b": 4}}, "rank_pattern: this regular expression can not be served"),
        ({"alpha_pattern": {"(a{999}){999}": 4}}, "can not be served: it takes too long to match"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] is 0, expected a whole number"),
        ({"alpha_pattern": ["q"]}, "alpha_pattern is ['q'], expected an object from module names"),
        ({"rank": 0}, "r is 0, expected a whole number greater than 0"),
        ({"rank": True}, "r is True, expected a whole number greater than 0"),
        ({"r": "8"}, "r is '8', expected a whole number greater than 0"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number of magnitude below 2**64"),
        ({"lora_alpha": 10**400}, "expected a number of magnitude below 2**64"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected None or False or True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', expected"),
        ({"init_lora_weights": "corda"}, "must be converted when it is saved"),
        (
            {"layers_pattern": "h"},
            "layers_pattern is 'h', expected null without layers_to_transform",
        ),
        (
            {"layers_pattern": "h|layers", "layers_to_transform": 0},
            "layers_pattern: this regular expression can not be served: 'h|layers' has a '|' outs",
        ),
        (
            {"layers_pattern": [0], "layers_to_transform": 0},
            "layers_pattern is [0], expected a name of layers or a list of them",
        ),
        (
            {"layers_pattern": "h", "target_modules": ".*"},
            "layers_pattern is 'h', expected null beside target_modules '.*', as in PEFT",
        ),
        ({"layers_to_transform": [-1]}, "layers_to_transform is [-1], expected a layer's index"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "as in PEFT"),
        ({"brand_new": 1}, "brand_new is 1, expected null, false or empty: a field unknown to"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]], expected null"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(
    fields: dict[str, object], message: str
) -> None:
    assert f"{WHERE}: " in (text := refusal(**fields))
    assert message in text


def test_fields_that_say_nothing_are_accepted() -> None:
    parse(use_dora=False, modules_to_save=None, layer_replication=[], brand_new="", loftq_config={})


def test_training_fields_have_no_effect() -> None:
    noisy = {name: "something" for name in TRAINING_ONLY}
    assert parse(**noisy) == parse()


def test_what_peft_itself_writes_is_accepted() -> None:
    written = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ).to_dict()
    written["target_modules"] = sorted(written["target_modules"])
    config = parse_config(json.dumps(written).encode(), WHERE)
    assert config == parse(rank=8, lora_alpha=16, target_modules=["q_proj"])


def test_mutated_configurations_are_read_or_refused() -> None:
    original = json.dumps(config_fields(rank_pattern={"q_proj": 4}, exclude_modules=["x"])).encode()
    seed = 20_241
    generator = random.Random(seed)
    num_refused = 0
    for _ in range(3_000):
        mutated = bytearray(original)
        for _ in range(generator.randint(1, 3)):
            position = generator.randrange(len(mutated))
            mutated[position : position + generator.randrange(3)] = generator.choice(
                [b"", b"0", b"[", b"{}", b'"', b"null", b"\xff", b"1e999", b"-"]
            )
        try:
            config = parse_config(bytes(mutated), WHERE)
            assert all(math.isfinite(config.scaling_of(path)) for path in PATHS), f"seed {seed}"
        except AdapterInvalid as error:
            assert len(error.message) < 500, f"seed {seed}"
            num_refused += 1
    assert 1_000 < num_refused < 3_000


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"[]", "is not a JSON object: []"),
        (b"", "is not valid JSON"),
        (b'{"r": 8, "r": 16}', "the key 'r' stands there twice"),
        (b'{"lora_alpha": Infinity}', "Infinity is not a number of JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_file_that_is_no_configuration_is_refused(payload: bytes, message: str) -> None:
    with pytest.raises(AdapterInvalid, match="adapter_config") as caught:
        parse_config(payload, WHERE)
    assert message in caught.value.message
