"""The base model that an adapter is looked at with: a folder's, or what its own tensors tell."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from engine.models.config import read_model_config
from ipc.base_model import EMBED_PATH, HEAD_PATH, LINEAR_GROUPS, BaseModel, DType, LinearShape
from ipc.errors import InvalidRequest
from ipc.image import EntryKind
from loader.adapter_files import AdapterFolders
from loader.peft_adapter import Parts, gather
from loader.peft_extras import Extras
from loader.peft_files import TensorFile, find_files, is_gguf
from loader.peft_vocab import VocabTensors
from loader.quantized import ReadSmall, encoding_of
from loader.safetensors_header import parse_header, read_header
from loader.scales import read_told

# What models are served in by default, most of them on a GPU.
DEFAULT_DTYPE = DType.BFLOAT16

_ATTENTION = {*LINEAR_GROUPS[0], *LINEAR_GROUPS[1]}
_PATHS = {
    name: f"{'self_attn' if name in _ATTENTION else 'mlp'}.{name}"
    for group in LINEAR_GROUPS
    for name in group
}
_LINEAR = re.compile(r"model\.layers\.([0-9]{1,3})\.\w+\.(\w+)")


def base_of_model(folder: Path, dtype: DType | None) -> BaseModel:
    """The model in ``folder``, in ``dtype`` or its own.

    Raises:
        InvalidRequest: there is none, or one that can not be served.
    """
    config = read_model_config(folder)
    return config.base_model(dtype or config.dtype)


def base_of_adapter(folders: AdapterFolders, path: str, dtype: DType | None) -> BaseModel:
    """The base that the tensors of the PEFT folder at ``path`` would fit, as far as they tell.

    It has as many layers as they name, and linear layers of the first sizes that they give; one
    that has no tensors is of size 1. Only those have a bias for which the adapter brings one.
    Embedding and head are tied to each other if there are tensors of both: then the adapter may be
    one that was trained so.

    Raises:
        SidestreamError: the files can not be found or read.
    """
    place = folders.resolve(path)
    names = find_files(place.folder) if place.name is None else (place.name,)
    if is_gguf(names):
        raise InvalidRequest(f"{place.path}: --model is needed to look at a GGUF adapter")
    files = folders.open(place.folder, names)
    try:
        tensor_files = []
        for index, identity in enumerate(files.identities):
            if identity.name.endswith(".safetensors"):
                header = read_header(files.fds[index], identity.num_bytes, identity.name)
                tensors = parse_header(header, identity.num_bytes, identity.name)
                tensor_files.append(TensorFile(index, identity.name, tensors))
        return base_of_tensors(tensor_files, dtype, partial(read_told, fds=files.fds))
    finally:
        files.close()


def base_of_tensors(files: Sequence[TensorFile], dtype: DType | None, read: ReadSmall) -> BaseModel:
    """As ``base_of_adapter``, from what the headers say; ``read`` is as for ``encoding_of``."""
    in_features: dict[str, int] = {}
    out_features: dict[str, int] = {}
    num_layers = 1
    parts, others = gather(files)
    extras, others = Extras.gather(others)
    vocab, _ = VocabTensors.gather(others)
    biased = {match[2] for path in extras.biases if (match := _LINEAR.fullmatch(path))}
    vocab_sizes, hidden_sizes = vocab.sizes()
    for (path, kind), of_tensor in parts.items():
        if path == HEAD_PATH:
            encoding = encoding_of(of_tensor, read)
            if kind is EntryKind.LORA_A:
                hidden_sizes.append(encoding.columns)
            else:
                vocab_sizes.append(encoding.rows)
        match = _LINEAR.fullmatch(path)
        if match is None:
            continue
        encoding = encoding_of(of_tensor, read)
        num_layers = max(num_layers, int(match[1]) + 1)
        if kind is EntryKind.LORA_A:
            in_features.setdefault(match[2], encoding.columns)
        else:
            out_features.setdefault(match[2], encoding.rows)
    return BaseModel(
        architecture="unknown",
        num_layers=num_layers,
        hidden_size=in_features.get("q_proj", next(iter(hidden_sizes), 1)),
        vocab_size=next(iter(vocab_sizes), 1),
        num_heads=1,
        num_kv_heads=1,
        dtype=dtype or DEFAULT_DTYPE,
        linears=tuple(
            LinearShape(
                name, path, in_features.get(name, 1), out_features.get(name, 1), name in biased
            )
            for name, path in _PATHS.items()
        ),
        tie_word_embeddings=_has_both(vocab, parts),
    )


def _has_both(vocab: VocabTensors, parts: Mapping[tuple[str, EntryKind], Parts]) -> bool:
    has_embedding = bool(vocab.embedding) or EMBED_PATH in vocab.wholes
    has_head = (HEAD_PATH, EntryKind.LORA_A) in parts or HEAD_PATH in vocab.wholes
    return has_embedding and has_head
