"""A decoder's shape and arithmetic, as the ``config.json`` of a Hugging Face folder gives them.

What would change an answer and is not honoured is refused by its name. Fields that have no effect
on inference are ignored.

Source: the configuration classes of transformers 4 and 5 (``rope_scaling`` and ``rope_theta``
there, ``rope_parameters`` here), defaults for absent fields included.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.errors import InvalidRequest

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)

_DEFAULT_ROPE_THETA = 10_000.0
_MISTRAL_SLIDING_WINDOW = 4096
_QWEN3_HEAD_DIM = 128

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]


class LinearScaling(msgspec.Struct, frozen=True):
    """Every rotary frequency is divided by ``factor``."""

    factor: Positive


class Llama3Scaling(msgspec.Struct, frozen=True):
    """Long wavelengths are stretched by ``factor``, short ones kept, those between blended."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Count


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding over the whole head; ``scaling`` None is the plain one."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """All that the engine knows of a model besides its weights.

    ``dtype`` is the one it is stored in. ``o_bias`` and ``qkv_bias`` are biases of attention's
    projections; ``qk_norm`` is an RMS norm over each query and key head.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: DType
    eos_token_ids: tuple[int, ...]
    max_model_len: int

    @property
    def query_size(self) -> int:
        """Columns of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key heads together; as many again are the value heads'."""
        return self.num_kv_heads * self.head_dim

    def base_model(self, dtype: DType) -> BaseModel:
        """What the loader is told; ``dtype`` is the one the engine computes in."""
        shapes = {
            "q_proj": ("self_attn", self.hidden_size, self.query_size, self.qkv_bias),
            "k_proj": ("self_attn", self.hidden_size, self.kv_size, self.qkv_bias),
            "v_proj": ("self_attn", self.hidden_size, self.kv_size, self.qkv_bias),
            "o_proj": ("self_attn", self.query_size, self.hidden_size, self.o_bias),
            "gate_proj": ("mlp", self.hidden_size, self.intermediate_size, self.mlp_bias),
            "up_proj": ("mlp", self.hidden_size, self.intermediate_size, self.mlp_bias),
            "down_proj": ("mlp", self.intermediate_size, self.hidden_size, self.mlp_bias),
        }
        linears = []
        for name in LINEAR_MODULES:
            parent, in_features, out_features, has_bias = shapes[name]
            path = f"{parent}.{name}"
            linears.append(LinearShape(name, path, in_features, out_features, has_bias))
        return BaseModel(
            architecture=self.architecture,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            dtype=dtype,
            linears=tuple(linears),
            tie_word_embeddings=self.tie_word_embeddings,
        )


class _ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """``config.json``: the fields that have an effect on some supported architecture."""

    architectures: list[str]
    num_hidden_layers: Count
    hidden_size: Count
    intermediate_size: Count
    vocab_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count | UnsetType | None = UNSET
    head_dim: Count | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Positive
    max_position_embeddings: Count
    rope_theta: Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Count | UnsetType | None = UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    tie_word_embeddings: bool = False
    quantization_config: dict[str, Any] | None = None
    dtype: DType | None = None
    torch_dtype: DType | None = None
    eos_token_id: int | list[int] | None = None


class _GenerationFile(msgspec.Struct, frozen=True):
    """``generation_config.json``: it may name further tokens that end an answer."""

    eos_token_id: int | list[int] | None = None


_FileT = TypeVar("_FileT")


def read_model_config(folder: Path, max_model_len: int | None = None) -> ModelConfig:
    """The model in ``folder``, limited to ``max_model_len`` tokens (None: as many as it allows).

    Raises:
        InvalidRequest: a file is missing or malformed, or a field is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InvalidRequest(f"{folder}: expected a folder with a config.json", param="model")
    file = _read(path, _ConfigFile)
    generation_path = folder / "generation_config.json"
    generation = _GenerationFile()
    if generation_path.is_file():
        generation = _read(generation_path, _GenerationFile)

    architecture = file.architectures[0] if file.architectures else ""
    if architecture not in ARCHITECTURES:
        _refuse(path, "architectures", f"one of {', '.join(ARCHITECTURES)}", architecture)
    if file.hidden_act != "silu":
        _refuse(path, "hidden_act", "silu", file.hidden_act)
    if file.quantization_config is not None:
        method = file.quantization_config.get("quant_method", "one without quant_method")
        _refuse(path, "quantization_config", "unquantized weights", method)

    num_kv_heads = file.num_key_value_heads
    if num_kv_heads is UNSET and architecture != "LlamaForCausalLM":
        _refuse(path, "num_key_value_heads", "a number of heads", "nothing")
    if num_kv_heads is UNSET or num_kv_heads is None:
        num_kv_heads = file.num_attention_heads
    if file.num_attention_heads % num_kv_heads:
        expected = f"a divisor of num_attention_heads {file.num_attention_heads}"
        _refuse(path, "num_key_value_heads", expected, num_kv_heads)

    length = _model_len(path, file, max_model_len)
    _check_sliding_window(path, file, architecture, length)
    has_attention_bias = file.attention_bias and architecture in (
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
    )
    return ModelConfig(
        architecture=architecture,
        num_layers=file.num_hidden_layers,
        hidden_size=file.hidden_size,
        intermediate_size=file.intermediate_size,
        vocab_size=file.vocab_size,
        num_heads=file.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(path, file, architecture),
        rms_norm_eps=file.rms_norm_eps,
        rope=_rope(path, file),
        qkv_bias=has_attention_bias or architecture == "Qwen2ForCausalLM",
        o_bias=has_attention_bias,
        mlp_bias=file.mlp_bias and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=file.tie_word_embeddings,
        dtype=file.dtype or file.torch_dtype or DType.FLOAT32,
        eos_token_ids=_eos_token_ids(file.eos_token_id, generation.eos_token_id),
        max_model_len=length,
    )


def _read(path: Path, kind: type[_FileT]) -> _FileT:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{path}: {error}", param="model") from error


def _refuse(path: Path, field: str, expected: str, got: object) -> NoReturn:
    raise InvalidRequest(f"{field} in {path}: expected {expected}, got {got}", param="model")


def _head_dim(path: Path, file: _ConfigFile, architecture: str) -> int:
    head_dim = file.head_dim
    if head_dim is None and architecture == "Qwen3ForCausalLM":
        head_dim = _QWEN3_HEAD_DIM
    if head_dim is None:
        if file.hidden_size % file.num_attention_heads:
            expected = f"a multiple of num_attention_heads {file.num_attention_heads}"
            _refuse(path, "hidden_size", expected, file.hidden_size)
        head_dim = file.hidden_size // file.num_attention_heads
    if head_dim % 2:
        _refuse(path, "head_dim", "an even number", head_dim)
    return head_dim


def _model_len(path: Path, file: _ConfigFile, max_model_len: int | None) -> int:
    longest = file.max_position_embeddings
    if max_model_len is None:
        return longest
    if not 1 <= max_model_len <= longest:
        raise InvalidRequest(
            f"max_model_len: expected one of [1, {longest}] (max_position_embeddings in {path}),"
            f" got {max_model_len}",
            param="max_model_len",
        )
    return max_model_len


def _check_sliding_window(path: Path, file: _ConfigFile, architecture: str, length: int) -> None:
    """Refuses a window that some sequence could outgrow; up to its size it changes nothing."""
    window: int | None = None
    if architecture == "MistralForCausalLM":
        given = file.sliding_window
        window = _MISTRAL_SLIDING_WINDOW if given is UNSET else given
    elif architecture.startswith("Qwen") and file.use_sliding_window:
        layer_types = file.layer_types
        if layer_types is None:
            slides = file.max_window_layers < file.num_hidden_layers
        else:
            slides = set(layer_types) != {"full_attention"}
        if slides and file.sliding_window is not UNSET:
            window = file.sliding_window
    if window is not None and window < length:
        expected = f"none below the model's length {length}, unless max_model_len is lowered to it"
        _refuse(path, "sliding_window", expected, window)


def _rope(path: Path, file: _ConfigFile) -> Rope:
    name = "rope_scaling" if file.rope_scaling else "rope_parameters"
    fields = file.rope_scaling or file.rope_parameters or {}
    partial = fields.get("partial_rotary_factor", file.partial_rotary_factor)
    if partial not in (None, 1, 1.0):
        _refuse(path, "partial_rotary_factor", "1.0", partial)
    theta = fields.get("rope_theta", file.rope_theta) or _DEFAULT_ROPE_THETA
    if not isinstance(theta, int | float) or theta <= 0:
        _refuse(path, f"{name}.rope_theta", "a number above 0", theta)
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return Rope(float(theta))
    scalings: dict[str, type[RopeScaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling}
    if kind not in scalings:
        _refuse(path, f"{name}.rope_type", f"one of default, {', '.join(scalings)}", kind)
    try:
        scaling = msgspec.convert(fields, scalings[kind])
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name} in {path}: {error}", param="model") from error
    if isinstance(scaling, Llama3Scaling) and scaling.high_freq_factor <= scaling.low_freq_factor:
        expected = f"more than low_freq_factor {scaling.low_freq_factor}"
        _refuse(path, f"{name}.high_freq_factor", expected, scaling.high_freq_factor)
    return Rope(float(theta), scaling)


def _eos_token_ids(*named: int | list[int] | None) -> tuple[int, ...]:
    """All that are named anywhere, each once, the first named first."""
    token_ids: dict[int, None] = {}
    for name in named:
        if name is not None:
            token_ids.update(dict.fromkeys([name] if isinstance(name, int) else name))
    return tuple(token_ids)
