"""Reads the base model's own linears, a few rows at a time, as the engine holds them.

A model folder has ``model.safetensors``, or shards that ``model.safetensors.index.json`` names.
Nothing is kept in memory beyond the headers.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ipc.base_model import DType
from ipc.errors import AdapterInvalid, Unavailable
from ipc.messages import FileIdentity
from loader import strict_json
from loader.adapter_files import AdapterFiles
from loader.floats import FLOAT_DTYPES, Floats, widen_as
from loader.safetensors_header import FileTensor, parse_header, read_header
from loader.scales import read_all

_WHOLE_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor in the ``file``-th of a folder's files."""

    file: int
    tensor: FileTensor


class BaseWeights:
    """The open files of the base model in ``folder``; values are rounded to ``dtype``.

    Owns its descriptors until ``close``. Reading is safe from many threads.

    Raises:
        Unavailable: a file is missing, can not be read or is damaged.
    """

    def __init__(self, folder: str, dtype: DType) -> None:
        self._dtype = dtype
        self._folder = folder
        with _told_of(folder):
            self._files = _open(folder)
            try:
                self._places = self._look()
            except BaseException:
                self.close()
                raise

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Of all files, as they were when they were opened."""
        return self._files.identities

    def read_rows(self, name: str, shape: tuple[int, ...], first: int, last: int) -> Floats:
        """Rows ``[first, last)`` of the tensor called ``name``, the caller's to write.

        Raises:
            Unavailable: there is none of this ``shape``, or it can not be read.
        """
        with _told_of(self._folder):
            place = self._places.get(name)
            if place is None:
                raise AdapterInvalid(f"tensor {name!r}: expected one, got none")
            tensor = place.tensor
            if tensor.shape != shape or tensor.dtype not in FLOAT_DTYPES:
                raise AdapterInvalid(
                    f"tensor {name!r}: expected floating-point numbers in {list(shape)}, got"
                    f" {tensor.dtype.value} in {list(tensor.shape)}"
                )
            row_bytes = tensor.num_bytes // shape[0]
            offset = tensor.offset + first * row_bytes
            fd = self._files.fds[place.file]
            payload = read_all(fd, offset, (last - first) * row_bytes, name)
        values = widen_as(payload, tensor.dtype, self._dtype)
        return values.reshape(last - first, *shape[1:])

    def check_unchanged(self) -> None:
        """Raises ``Unavailable`` if a file was written to since it was opened."""
        with _told_of(self._folder):
            self._files.check_unchanged()

    def close(self) -> None:
        self._files.close()

    def _look(self) -> dict[str, _Place]:
        places = {}
        for index, identity in enumerate(self._files.identities):
            header = read_header(self._files.fds[index], identity.num_bytes, identity.name)
            for tensor in parse_header(header, identity.num_bytes, identity.name):
                places[tensor.name] = _Place(index, tensor)
        return places


def _open(folder: str) -> AdapterFiles:
    fds: list[int] = []
    try:
        names = _file_names(Path(folder))
        for name in names:
            fds.append(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC))
        return AdapterFiles(folder, names, fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _file_names(folder: Path) -> list[str]:
    if (folder / _WHOLE_NAME).is_file():
        return [_WHOLE_NAME]
    index = strict_json.parse((folder / _INDEX_NAME).read_bytes(), _INDEX_NAME)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise AdapterInvalid(f"{_INDEX_NAME}: expected a weight_map from tensors to files")
    return sorted(set(shards.values()))


@contextlib.contextmanager
def _told_of(folder: str) -> Iterator[None]:
    """What is wrong with the base model is no adapter's fault."""
    try:
        yield
    except AdapterInvalid as error:
        raise Unavailable(f"the base model in {folder} can not be read: {error.message}") from error
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise Unavailable(
            f"the base model in {folder} can not be read:{where} {error.strerror}"
        ) from error
