"""Turns the header of a GGUF adapter into a plan, or says what is wrong.

A tensor is called ``blk.N.attn_q.weight.lora_a`` (``[r, in]``) or ``….lora_b`` (``[out, r]``);
those of the head begin with ``output``, those of the embedding with ``token_embd``, whose A is
stored ``[vocab, r]``. Beside a base whose head is its embedding neither can be served: llama.cpp
has no meaning for them there.

The scaling is ``alpha / r`` with each module's own rank, or 1 where ``adapter.lora.alpha`` is 0 or
not there. For Llama and Mistral the writer has interleaved the rows of q and k, of B that is.

Sources: ``llama_adapter_lora_init_impl`` and ``llama_adapter_lora_weight::get_scale`` of llama.cpp;
``permute`` of its ``convert_hf_to_gguf.py``.
"""

import math
import re
from dataclasses import dataclass

from ipc.base_model import EMBED_MODULE, HEAD_MODULE, BaseModel
from ipc.errors import AdapterInvalid
from ipc.image import AdapterModule, EntryKind, layout_image
from loader.gguf_header import GgufHeader, GgufTensor
from loader.native.runs import TILE_VALUES
from loader.plan import AdapterPlan, TensorPlan
from loader.strict_json import shorten
from loader.vocab_shapes import embedding_shape, head_shape

FORMAT = "gguf"

_MODULES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_INTERLEAVED = "llama"
_VOCAB_MODULES = {"token_embd": EMBED_MODULE, "output": HEAD_MODULE}
_TENSOR_NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?(\w+)\.weight\.(lora_a|lora_b)")
_KINDS = {"lora_a": EntryKind.LORA_A, "lora_b": EntryKind.LORA_B}
_ALPHA = "adapter.lora.alpha"
_Place = tuple[int, str]
"""A stage and a module of it."""


@dataclass(frozen=True, slots=True)
class _Pair:
    a: GgufTensor
    b: GgufTensor
    a_is_transposed: bool

    @property
    def rank(self) -> int:
        return self.a.shape[-1 if self.a_is_transposed else 0]


def plan_gguf(header: GgufHeader, base: BaseModel, max_lora_rank: int, where: str) -> AdapterPlan:
    """The plan of the adapter in file 0, which is called ``where``.

    Raises:
        AdapterInvalid: it is no adapter of ``base``, or a part of it can not be served.
    """
    architecture = _check_metadata(header, base, where)
    alpha = header.metadata.get(_ALPHA, 0.0)
    if type(alpha) is not float or not abs(alpha) < 2.0**64:
        raise AdapterInvalid(f"{where}: {_ALPHA}: expected a number, got {shorten(alpha)}")
    pairs = _pairs(header, base, where)
    modules = []
    for (stage_index, name), pair in sorted(pairs.items()):
        _check_pair(pair, base, name, max_lora_rank, where)
        scaling = alpha / pair.rank if alpha else 1.0
        modules.append(AdapterModule(stage_index, name, pair.rank, scaling))
    if not modules:
        raise AdapterInvalid(f"{where} has no low-rank pair")
    layout = layout_image(base, modules)
    head_rows = {"q_proj": 0, "k_proj": 0}
    if architecture == _INTERLEAVED:
        head_rows["q_proj"] = base.linear("q_proj").out_features // base.num_heads
        head_rows["k_proj"] = base.linear("k_proj").out_features // base.num_kv_heads
    plans = []
    for stage_index, stage in enumerate(layout.stages):
        for entry in stage.entries:
            pair = pairs[stage_index, entry.module]
            is_a = entry.kind is EntryKind.LORA_A
            tensor = pair.a if is_a else pair.b
            rows, columns = tensor.shape
            of_head = 0 if is_a else head_rows.get(entry.module, 0)
            if of_head * columns > TILE_VALUES:
                raise AdapterInvalid(
                    f"{where}: rank {columns} of {tensor.name} exceeds {TILE_VALUES // of_head},"
                    f" the greatest where heads of {of_head} rows are interleaved"
                )
            plans.append(
                TensorPlan(
                    tensor.name,
                    0,
                    tensor.offset,
                    tensor.type if tensor.type.format is None else tensor.type.format,
                    rows,
                    columns,
                    stage_index,
                    entry,
                    head_rows=of_head,
                    is_transposed=is_a and pair.a_is_transposed,
                )
            )
    return AdapterPlan(FORMAT, tuple(modules), layout, base.dtype, tuple(plans))


def _check_metadata(header: GgufHeader, base: BaseModel, where: str) -> str:
    """Returns the architecture, as llama.cpp names it."""
    architecture = _ARCHITECTURES.get(base.architecture)
    expected = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": architecture,
    }
    for field, value in expected.items():
        got = header.metadata.get(field)
        if got != value:
            raise AdapterInvalid(
                f"{where}: {field}: expected {value!r} beside a {base.architecture}, got"
                f" {shorten(got)}"
            )
    for field in header.metadata:
        if field.startswith("adapter.") and field not in (_ALPHA, "adapter.type"):
            raise AdapterInvalid(f"{where}: {shorten(field)} can not be served")
    assert architecture is not None, base.architecture
    return architecture


def _pairs(header: GgufHeader, base: BaseModel, where: str) -> dict[_Place, _Pair]:
    halves: dict[_Place, dict[EntryKind, GgufTensor]] = {}
    for tensor in header.tensors:
        match = _TENSOR_NAME.fullmatch(tensor.name)
        place = None if match is None else _place_of(match[1], match[2], base)
        if match is None or place is None:
            raise AdapterInvalid(
                f"{where}: tensor {shorten(tensor.name, 160)} can not be served; expected"
                f" blk.N.<linear layer>.weight.lora_a or .lora_b with N below {base.num_layers} and"
                f" one of {', '.join(_MODULES)}, or {' or '.join(_VOCAB_MODULES)} in the place of"
                " blk.N.<linear layer>"
            )
        if place[1] in _VOCAB_MODULES.values() and base.tie_word_embeddings:
            raise AdapterInvalid(
                f"{where}: tensor {shorten(tensor.name, 160)} can not be served: expected a base"
                " whose embedding and head are not tied to each other"
            )
        halves.setdefault(place, {})[_KINDS[match[3]]] = tensor
    pairs = {}
    for place, half in halves.items():
        for short, kind in _KINDS.items():
            if kind not in half:
                other = next(iter(half.values()))
                raise AdapterInvalid(f"{where} has no {short} beside {other.name}")
        is_transposed = place[1] == EMBED_MODULE
        pairs[place] = _Pair(half[EntryKind.LORA_A], half[EntryKind.LORA_B], is_transposed)
    return pairs


def _place_of(layer: str | None, name: str, base: BaseModel) -> _Place | None:
    """Where the module stands that GGUF calls so, of a layer if one is given."""
    if layer is None:
        module = _VOCAB_MODULES.get(name)
        stage = 0 if module == EMBED_MODULE else base.head_stage
    else:
        module = _MODULES.get(name) if int(layer) < base.num_layers else None
        stage = base.layer_stage(int(layer))
    return None if module is None else (stage, module)


def _check_pair(pair: _Pair, base: BaseModel, name: str, max_lora_rank: int, where: str) -> None:
    if name in _VOCAB_MODULES.values():
        shape = embedding_shape(base) if name == EMBED_MODULE else head_shape(base)
    else:
        shape = base.linear(name)
    of_a = (pair.rank, shape.in_features)
    for tensor, expected in (
        (pair.a, of_a[::-1] if pair.a_is_transposed else of_a),
        (pair.b, (shape.out_features, pair.rank)),
    ):
        if tensor.shape != expected:
            raise AdapterInvalid(
                f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected"
                f" {list(expected)}"
            )
    assert math.prod(pair.a.shape) > 0
    if pair.rank > max_lora_rank:
        raise AdapterInvalid(
            f"rank {pair.rank} of {pair.a.name} exceeds --max-lora-rank {max_lora_rank}"
        )
