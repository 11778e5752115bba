"""Turns a PEFT folder's configuration and tensor header into a plan, or says what is wrong.

A tensor is called ``base_model.model.<module path>.lora_A.weight`` (``[r, in]``) or
``.lora_B.weight`` (``[out, r]``); what describes it where it is quantized begins with the same name
(``loader.quantized``). Every tensor must belong to a module that the configuration targets, and
every targeted module must have its two. Magnitudes of DoRA and trained biases: see
``loader.peft_extras``; embedding and head: see ``loader.peft_vocab``. In which of the adapter's
files a tensor stands has no meaning.

Source: ``get_peft_model_state_dict`` of PEFT 0.21.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipc.base_model import EMBED_PATH, HEAD_PATH, BaseModel, LinearShape
from ipc.errors import AdapterInvalid
from ipc.image import AdapterModule, Entry, EntryKind, layout_image
from loader.native.runs import FILE_FORMATS, Format
from loader.peft_config import PeftConfig
from loader.peft_extras import Extras, unexpected_bias
from loader.peft_files import CONFIG_NAME, TensorFile
from loader.peft_vocab import VocabChoice, VocabTensors
from loader.plan import DERIVED_KINDS, AdapterPlan, TensorPlan
from loader.quantized import Encoding, ReadSmall, encoding_of
from loader.scales import StoredTensor
from loader.strict_json import shorten
from loader.vocab_shapes import embedding_shape, head_shape

FORMAT = "peft"

_TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.(.+)")
_KINDS = {"lora_A": EntryKind.LORA_A, "lora_B": EntryKind.LORA_B}
# Of a pair beside which an image has a bias that the file has alone.
_RANK_OF_ZEROS = 1
# What tensors that can not be served are, by a part of their names.
_UNSERVED = {
    "lora_magnitude_vector": "DoRA of what is no targeted linear layer",
}

Parts = dict[str, StoredTensor]
"""One of a module's two tensors, and what describes it, by the rest of their names."""


@dataclass(frozen=True, slots=True)
class _Module:
    """A linear layer of the base, its embedding or its head: ``path`` from the base model's root.

    ``layer`` is None for the latter two.
    """

    path: str
    stage: int
    layer: int | None
    shape: LinearShape

    @property
    def short_path(self) -> str:
        return self.path.removeprefix("model.")


def plan_adapter(
    config: PeftConfig,
    files: Sequence[TensorFile],
    base: BaseModel,
    max_lora_rank: int,
    read: ReadSmall,
) -> AdapterPlan:
    """The plan of an adapter whose tensors are those of ``files``.

    ``read`` is as for ``encoding_of``.

    Raises:
        AdapterInvalid: a tensor is unknown, missing or misshapen, or a rank is too high.
    """
    where = files[0].name if len(files) == 1 else f"{files[0].name} to {files[-1].name}"
    choice = VocabChoice.of(config, base)
    known = {module.path: module for module in _modules(base)}
    parts, others = gather(files)
    extras, others = Extras.gather(others)
    vocab, others = VocabTensors.gather(others)
    for stored in others:
        raise _misplaced(stored, config, base)
    pairs: dict[str, dict[EntryKind, Encoding]] = {}
    for (path, kind), of_tensor in parts.items():
        for stored in of_tensor.values():
            if path not in known or path == EMBED_PATH or stored.tensor.name.endswith(".bias"):
                raise _misplaced(stored, config, base)
        pairs.setdefault(path, {})[kind] = encoding_of(of_tensor, read)
    if vocab.embedding:
        pairs[EMBED_PATH] = vocab.embedding_pair()
    saved = vocab.saved(choice, base, where)

    modules = []
    derivations = []
    for path, module in known.items():
        if module.layer is None:
            targeted = path in choice.targeted
        else:
            targeted = config.is_targeted(path, module.layer)
        pair = pairs.get(path)
        if pair is not None and not targeted:
            raise AdapterInvalid(
                f"{where} has tensors of {module.short_path}, which {CONFIG_NAME} does not target"
            )
        derivation = None
        if targeted:
            rank = _check_pair(module, pair or {}, config, max_lora_rank, where)
            scaling = config.scaling_of(path)
            if module.layer is not None:
                derivation = extras.derivation(config, module.stage, path, module.shape, where)
        elif path in saved:
            rank, scaling = 0, 1.0
        else:
            rank, scaling = _RANK_OF_ZEROS, 0.0
            if module.layer is not None:
                derivation = extras.lone_derivation(config, module.stage, path, module.shape)
            if derivation is None:
                continue
        if derivation is not None:
            derivations.append(derivation)
        modules.append(
            AdapterModule(
                module.stage,
                module.shape.name,
                rank,
                scaling,
                row_scale=derivation is not None and derivation.scales_rows,
                bias=derivation is not None and derivation.adds_bias,
                whole=path in saved,
            )
        )
    if not pairs:
        raise AdapterInvalid(
            f"{CONFIG_NAME} targets no module of the base: target_modules is"
            f" {config.target_modules}",
            param="target_modules",
        )
    # By now each path of a pair is one of a targeted linear.
    linears = {path for path, module in known.items() if module.layer is not None}
    for stored in extras.of_others(linears & pairs.keys(), linears):
        raise _misplaced(stored, config, base)

    layout = layout_image(base, modules)
    paths = {(module.stage, module.shape.name): path for path, module in known.items()}
    plans = []
    # Of the derived values, whose file is the next one.
    derived_file, derived_bytes = files[-1].index + 1, 0
    for stage_index, stage in enumerate(layout.stages):
        for entry in stage.entries:
            path = paths[stage_index, entry.module]
            if entry.kind in DERIVED_KINDS:
                plan = _derived(path, derived_file, derived_bytes, stage_index, entry)
                derived_bytes += plan.file_bytes
                plans.append(plan)
                continue
            if entry.kind is EntryKind.WHOLE:
                plans.append(_whole(saved[path], stage_index, entry))
                continue
            if path not in pairs:
                plans.append(_zeros(path, stage_index, entry))
                continue
            encoding = pairs[path][entry.kind]
            values = encoding.values
            plans.append(
                TensorPlan(
                    values.tensor.name,
                    values.file,
                    values.tensor.offset,
                    encoding.format,
                    encoding.rows,
                    encoding.columns,
                    stage_index,
                    entry,
                    encoding.scales,
                )
            )
    return AdapterPlan(
        FORMAT,
        tuple(modules),
        layout,
        base.dtype,
        tuple(plans),
        tuple(derivations),
        vocab.copies(choice, base),
    )


def _derived(path: str, file: int, offset: int, stage: int, entry: Entry) -> TensorPlan:
    name = f"the {entry.kind.value} of {path}"
    return TensorPlan(name, file, offset, Format.FLOAT32, entry.rows, entry.columns, stage, entry)


def _whole(stored: StoredTensor, stage: int, entry: Entry) -> TensorPlan:
    tensor = stored.tensor
    return TensorPlan(
        tensor.name,
        stored.file,
        tensor.offset,
        FILE_FORMATS[tensor.dtype],
        entry.rows,
        entry.columns,
        stage,
        entry,
    )


def _zeros(path: str, stage: int, entry: Entry) -> TensorPlan:
    """A tensor without rows: all of the entry is beyond them."""
    columns = entry.columns
    return TensorPlan(f"the zeros of {path}", 0, 0, Format.FLOAT32, 0, columns, stage, entry)


def _modules(base: BaseModel) -> Iterator[_Module]:
    yield _Module(EMBED_PATH, 0, None, embedding_shape(base))
    for layer in range(base.num_layers):
        for shape in base.linears:
            path = f"model.layers.{layer}.{shape.path}"
            yield _Module(path, base.layer_stage(layer), layer, shape)
    yield _Module(HEAD_PATH, base.head_stage, None, head_shape(base))


def gather(
    files: Sequence[TensorFile],
) -> tuple[dict[tuple[str, EntryKind], Parts], list[StoredTensor]]:
    """The tensors of low-rank pairs, by module and which of the two they are of; and all others."""
    parts: dict[tuple[str, EntryKind], Parts] = {}
    others = []
    for file in files:
        for tensor in file.tensors:
            stored = StoredTensor(file.index, file.name, tensor)
            match = _TENSOR_NAME.fullmatch(tensor.name)
            if match is None:
                others.append(stored)
            else:
                parts.setdefault((match[1], _KINDS[match[2]]), {})[match[3]] = stored
    return parts, others


def _misplaced(stored: StoredTensor, config: PeftConfig, base: BaseModel) -> AdapterInvalid:
    """Why a tensor can not be served that is of no linear layer's pair."""
    name, where = stored.tensor.name, stored.file_name
    if name.endswith(".bias"):
        return unexpected_bias(stored, config)
    for part, meaning in _UNSERVED.items():
        if part in name:
            return AdapterInvalid(
                f"{where}: tensor {shorten(name, 160)} is of {meaning}, which can not be served"
            )
    return AdapterInvalid(
        f"{where}: tensor {shorten(name, 160)} is of no module of the base;"
        f" expected base_model.model.model.layers.N.<linear layer>.lora_A.weight or"
        f" .lora_B.weight with N below {base.num_layers}, or what PEFT has of {EMBED_PATH} and"
        f" {HEAD_PATH}"
    )


def _check_pair(
    module: _Module,
    pair: dict[EntryKind, Encoding],
    config: PeftConfig,
    max_lora_rank: int,
    where: str,
) -> int:
    """The rank of a targeted module's pair."""
    for name, kind in _KINDS.items():
        if kind not in pair:
            if module.path == EMBED_PATH:
                name = name.replace("lora_", "lora_embedding_")
            raise AdapterInvalid(
                f"{module.short_path} is targeted by {CONFIG_NAME}, but {where} has no {name} of it"
            )
    a, b = pair[EntryKind.LORA_A], pair[EntryKind.LORA_B]
    if a.columns != module.shape.in_features:
        raise _misshapen(a, f"[r, {module.shape.in_features}]")
    if b.rows != module.shape.out_features:
        raise _misshapen(b, f"[{module.shape.out_features}, r]")
    rank = a.rows
    if b.columns != rank:
        raise AdapterInvalid(
            f"lora_A has rank {rank} but lora_B has rank {b.columns} in {module.short_path}"
        )
    expected = config.rank_of(module.path)
    if rank != expected:
        raise AdapterInvalid(
            f"rank {rank} in {module.short_path} differs from {CONFIG_NAME}, which says {expected}"
        )
    if rank > max_lora_rank:
        raise AdapterInvalid(
            f"rank {rank} in {module.short_path} exceeds --max-lora-rank {max_lora_rank}"
        )
    return rank


def _misshapen(encoding: Encoding, expected: str) -> AdapterInvalid:
    values = encoding.values
    return AdapterInvalid(
        f"{values.file_name}: tensor {values.tensor.name!r} has shape"
        f" {[encoding.rows, encoding.columns]}, expected {expected}"
    )
