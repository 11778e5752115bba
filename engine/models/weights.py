"""Reads a checkpoint's safetensors files into a model, or says exactly why it does not fit.

All names and shapes are checked before the first value is read.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.device import Device
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from ipc.base_model import DType
from ipc.errors import InvalidRequest
from ipc.messages import FileIdentity

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
# Old Llama checkpoints store these; they follow from the configuration.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_FLOAT_DTYPES = ("F32", "F16", "BF16")
# A message names so many tensors and counts the rest.
_MAX_NAMED = 4


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def load_model(config: ModelConfig, folder: Path, dtype: DType, device: Device) -> Decoder:
    """The model in ``folder`` on the device, its weights rounded to ``dtype``.

    Raises:
        InvalidRequest: files are missing or damaged, a tensor is missing, unknown, of the wrong
            shape, not of a floating-point type, or too large for ``dtype``.
    """
    decoder = Decoder(config, dtype, device)
    read_weights(folder, decoder.checkpoint_tensors(), decoder.checkpoint_aliases())
    device.synchronize()
    return decoder


def checkpoint_identities(folder: Path) -> tuple[FileIdentity, ...]:
    """What the system says of the checkpoint's files, in order of their names.

    Raises:
        InvalidRequest: a file is missing.
    """
    identities = []
    for path in _checkpoint_files(folder):
        name, status = str(path.relative_to(folder)), path.stat()
        identities.append(
            FileIdentity(name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        )
    return tuple(identities)


def read_weights(folder: Path, into: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Fills every tensor of ``into`` from the file tensor of its name.

    A name of ``aliases`` may be stored too and must then equal the tensor that it stands for.

    Raises:
        InvalidRequest: see ``load_model``.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in _checkpoint_files(folder):
            file = stack.enter_context(_open(path))
            for name in file.keys():  # noqa: SIM118 - a file is no mapping
                if not name.endswith(_DERIVED_SUFFIX):
                    files[name] = file
        _check_names(folder, files, into, aliases)
        for name, file in files.items():
            _check_tensor(folder, name, file, into[aliases.get(name, name)])
        for name, target in into.items():
            _fill(folder, name, target, files[name].get_tensor(name))
        for name, original in aliases.items():
            if name in files and not torch.equal(
                files[name].get_tensor(name), files[original].get_tensor(original)
            ):
                raise _misfit(
                    f"{name} in {folder}: expected it to equal {original}, as tie_word_embeddings"
                    " says, got other values"
                )


def _checkpoint_files(folder: Path) -> Iterator[Path]:
    index_path = folder / _INDEX_FILE
    if (folder / _SINGLE_FILE).is_file():
        yield folder / _SINGLE_FILE
        return
    if not index_path.is_file():
        raise _misfit(f"{folder}: expected {_SINGLE_FILE} or {_INDEX_FILE}, got neither")
    try:
        index = msgspec.json.decode(index_path.read_bytes(), type=_Index)
    except msgspec.DecodeError as error:
        raise _misfit(f"{index_path}: {error}") from error
    for name in sorted(set(index.weight_map.values())):
        path = folder / name
        if not path.is_file():
            raise _misfit(f"{index_path}: expected a file {name} beside it, got none")
        yield path


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise _misfit(f"{path}: expected a safetensors file, got {error}") from error


def _check_names(
    folder: Path, files: Mapping[str, Any], into: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    missing = [name for name in into if name not in files]
    if missing:
        raise _misfit(f"{folder}: expected tensors that are not there: {_some(missing)}")
    unknown = [name for name in files if name not in into and name not in aliases]
    if unknown:
        raise _misfit(f"{folder}: got tensors that the model has no use for: {_some(unknown)}")


def _check_tensor(folder: Path, name: str, file: Any, target: Tensor) -> None:
    header = file.get_slice(name)
    shape = list(header.get_shape())
    if shape != list(target.shape):
        raise _misfit(f"{name} in {folder}: expected shape {list(target.shape)}, got {shape}")
    if header.get_dtype() not in _FLOAT_DTYPES:
        expected = f"one of {', '.join(_FLOAT_DTYPES)}"
        raise _misfit(f"{name} in {folder}: expected {expected}, got {header.get_dtype()}")


def _fill(folder: Path, name: str, target: Tensor, stored: Tensor) -> None:
    target.copy_(stored)
    # Only float16 has less range than what a checkpoint is stored in.
    if target.dtype is torch.float16 and stored.dtype is not torch.float16:
        largest = stored.abs().max().item()
        if largest > torch.finfo(torch.float16).max:
            raise _misfit(
                f"{name} in {folder}: expected values that float16 can hold, got {largest}"
            )


def _some(names: list[str]) -> str:
    named = ", ".join(names[:_MAX_NAMED])
    rest = len(names) - _MAX_NAMED
    return f"{named} and {rest} more" if rest > 0 else named


def _misfit(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="model")
