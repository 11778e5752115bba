"""Finds the files of a PEFT folder, and holds the index of a sharded one against the shards.

An adapter is ``adapter_config.json`` and either ``adapter_model.safetensors`` or shards of it
(``adapter_model-00001-of-00003.safetensors`` …) with ``adapter_model.safetensors.index.json``,
whose ``weight_map`` maps every tensor's name to the shard that holds it; or it is one GGUF file.
Transformers calls the index of an adapter's shards as it does a model's.

Sources: ``save_torch_state_dict`` of huggingface_hub, given the pattern of PEFT's own name;
``PreTrainedModel.save_pretrained`` of transformers, of a model with an adapter.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ipc.errors import AdapterInvalid
from loader import strict_json
from loader.adapter_files import GGUF_SUFFIX
from loader.safetensors_header import FileTensor
from loader.strict_json import shorten

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
INDEX_NAME = "adapter_model.safetensors.index.json"
TRANSFORMERS_INDEX_NAME = "model.safetensors.index.json"

# Each is an open file while it is read. One shard usually has gigabytes.
MAX_SHARDS = 64

_SHARD_NAME = re.compile(r"adapter_model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_PICKLE_NAME = re.compile(r"adapter_model.*\.bin")


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One of an adapter's files, the ``index``-th, and the tensors that its header describes."""

    index: int
    name: str
    tensors: tuple[FileTensor, ...]


def find_files(folder: str) -> tuple[str, ...]:
    """The names of the adapter's files: the configuration, the index if there is one, tensors.

    Whether they can be opened is not looked at; a folder without an adapter has those of a whole
    one, so that opening them says which is missing.

    Raises:
        AdapterInvalid: shards are missing, are too many or have no index, or there is something
            else than safetensors.
    """
    try:
        names = set(os.listdir(folder))
    except OSError:
        names = set()  # Opening the files will say what is wrong.
    shards = sorted(filter(_SHARD_NAME.fullmatch, names))
    if shards or INDEX_NAME in names:
        if TENSORS_NAME in names:
            raise AdapterInvalid(
                f"{folder} has {TENSORS_NAME} and {(shards or [INDEX_NAME])[0]}: expected a whole"
                " file or shards, not both"
            )
        # Without a shard the other name is that of the base model's index.
        indices = [name for name in (INDEX_NAME, TRANSFORMERS_INDEX_NAME) if name in names]
        return (CONFIG_NAME, *indices[:1], *_complete(folder, shards, bool(indices)))
    if TENSORS_NAME not in names:
        ggufs = sorted(name for name in names if name.endswith(GGUF_SUFFIX))
        if len(ggufs) == 1 and CONFIG_NAME not in names:
            return (ggufs[0],)
        _refuse_other_formats(folder, names, ggufs)
    return (CONFIG_NAME, TENSORS_NAME)


def check_index(payload: bytes, name: str, shards: Sequence[TensorFile]) -> None:
    """Checks that the index, called ``name``, says of each tensor where it is, and of no other.

    Raises:
        AdapterInvalid: it is no index, or contradicts the shards.
    """
    index = strict_json.parse(payload, name)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise AdapterInvalid(f"{name} has no weight_map: {shorten(index)}")
    weight_map = index["weight_map"]
    stands_in: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            other = stands_in.setdefault(tensor.name, shard.name)
            if other != shard.name:
                raise AdapterInvalid(
                    f"tensor {shorten(tensor.name, 160)} stands in {other} and in {shard.name}"
                )
    for tensor_name, shard_name in stands_in.items():
        said = weight_map.get(tensor_name)
        if said != shard_name:
            raise AdapterInvalid(
                f"{name}: weight_map says {shorten(said)} of tensor {shorten(tensor_name, 160)},"
                f" which stands in {shard_name}"
            )
    for tensor_name, said in weight_map.items():
        if tensor_name not in stands_in:
            raise AdapterInvalid(
                f"{name}: weight_map says {shorten(said)} of tensor {shorten(tensor_name, 160)},"
                " which stands in no shard"
            )


def _complete(folder: str, shards: Sequence[str], has_index: bool) -> Sequence[str]:
    """All of ``shards``, sorted, if they are what the first one's name promises."""
    if not shards:
        raise AdapterInvalid(f"{folder} has {INDEX_NAME}, but none of its shards")
    if not has_index:
        raise AdapterInvalid(f"{folder} has {shards[0]}, but no {INDEX_NAME}")
    match = _SHARD_NAME.fullmatch(shards[0])
    assert match is not None
    num_shards = int(match[2])
    if not 0 < num_shards <= MAX_SHARDS:
        raise AdapterInvalid(f"{folder} has {shards[0]}, expected 1 to {MAX_SHARDS} shards")
    expected = [
        f"adapter_model-{number:05}-of-{num_shards:05}.safetensors"
        for number in range(1, num_shards + 1)
    ]
    for name in expected:
        if name not in shards:
            raise AdapterInvalid(f"{folder} has {shards[0]}, but no {name}")
    if len(shards) > num_shards:
        other = next(name for name in shards if name not in expected)
        raise AdapterInvalid(f"{folder} has {shards[0]}, and {other}, which is none of these")
    return shards


def is_shard_name(name: str) -> bool:
    """Whether a shard of an adapter is called so."""
    return _SHARD_NAME.fullmatch(name) is not None


def is_gguf(names: Sequence[str]) -> bool:
    """Whether these files of an adapter are one in GGUF."""
    return len(names) == 1 and names[0].endswith(GGUF_SUFFIX)


def _refuse_other_formats(folder: str, names: set[str], ggufs: Sequence[str]) -> None:
    """Says what a folder without a safetensors file has instead, if that is known."""
    pickles = sorted(filter(_PICKLE_NAME.fullmatch, names))
    if pickles:
        raise AdapterInvalid(
            f"{folder} has {pickles[0]}, a pickle, which can run code when it is read; where you"
            f" trust it, convert it: PEFT's PeftModel.from_pretrained reads it, and"
            f" save_pretrained writes {TENSORS_NAME}"
        )
    if ggufs:
        raise AdapterInvalid(
            f"{folder} has {', '.join(ggufs[:3])}: expected one {GGUF_SUFFIX} file and no"
            f" {CONFIG_NAME}, or the path of the file itself"
        )
