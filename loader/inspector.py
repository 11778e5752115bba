"""Answers what an adapter is, and opens it again later as exactly that."""

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ipc.base_model import BaseModel
from ipc.errors import AdapterInvalid
from ipc.messages import AdapterId, AdapterSource, Generation, Manifest
from loader import gguf_header
from loader.adapter_files import (
    MTIME_GRANULARITY_NS,
    SETTLE_TIMEOUT_S,
    AdapterFiles,
    AdapterFolders,
    AdapterPlace,
)
from loader.gguf_adapter import plan_gguf
from loader.peft_adapter import plan_adapter
from loader.peft_config import parse_config
from loader.peft_files import CONFIG_NAME, TensorFile, check_index, find_files, is_gguf
from loader.plan import AdapterPlan
from loader.quantized import TOLD_WHEN_INSPECTED
from loader.safetensors_header import MAX_HEADER_BYTES, parse_header, read_header
from loader.scales import StoredTensor, read_told

MAX_CONFIG_BYTES = 1 << 20
# A plan takes up to some hundreds of kilobytes, and some milliseconds to make again. Adapters whose
# configurations and headers are equal, as those of one training setup are, share one.
NUM_CACHED_PLANS = 64

_PlanKey = tuple[str, tuple[int, ...]]
"""The digest of the bytes that a plan was made from, and the sizes of the files with tensors."""


@dataclass(frozen=True, slots=True)
class OpenAdapter:
    """An adapter whose ``files``, the receiver's to close, are of the generation asked for.

    It can be read once it ``is_complete``: derived values, if its plan has any, lie in its files.
    """

    files: AdapterFiles
    plan: AdapterPlan
    is_complete: bool = True


class Inspector:
    """Reads configurations and headers against one base model. Safe to use from many threads."""

    def __init__(
        self,
        folders: AdapterFolders,
        base: BaseModel,
        max_lora_rank: int,
        host_tier_bytes: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base = base
        self.max_lora_rank = max_lora_rank
        self._folders = folders
        self._host_tier_bytes = host_tier_bytes
        self._sleep = sleep
        self._lock = threading.Lock()
        self._plans: OrderedDict[_PlanKey, AdapterPlan] = OrderedDict()

    def inspect(self, adapter_id: AdapterId, path: str) -> Manifest:
        """What the adapter at ``path`` is, complete and checked against the base.

        Files that were written to a moment ago are looked at again a moment later, so that any
        write after this call changes the generation.

        Raises:
            InvalidRequest: the path is not allowed.
            AdapterNotFound: nothing lies there.
            AdapterInvalid: the adapter could not be served exactly as it is written.
        """
        return self._inspect(adapter_id, self._folders.resolve(path))

    def inspect_name(self, adapter_id: AdapterId, name: str) -> Manifest:
        """As ``inspect``, for the adapter called ``name`` in the adapter folder."""
        return self._inspect(adapter_id, self._folders.resolve_name(name))

    def open(self, source: AdapterSource) -> OpenAdapter:
        """Opens the adapter's files if they still are of the source's generation.

        Raises:
            AdapterInvalid: they have changed, or are gone.
            SidestreamError: as ``inspect``.
        """
        folder = self._folders.resolve(source.path).folder
        names = [identity.name for identity in source.generation.files]
        files = self._folders.open(folder, names)
        try:
            self._check_identity(files, source)
            plan = self._cached((source.generation.digest, _tensor_bytes(files)))
            if plan is None:
                plan, digest = self._read(files)
                if digest != source.generation.digest:
                    raise _changed(folder)
            return OpenAdapter(files, plan, is_complete=not plan.derivations)
        except BaseException:
            files.close()
            raise

    def _inspect(self, adapter_id: AdapterId, place: AdapterPlace) -> Manifest:
        folder = place.folder
        names = find_files(folder) if place.name is None else (place.name,)
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            files = self._folders.open(folder, names)
            try:
                if files.settled():
                    plan, digest = self._read(files)
                    files.check_unchanged()
                    generation = Generation(adapter_id, files.identities, digest)
                    break
            finally:
                files.close()
            if time.monotonic() > deadline_s:
                raise AdapterInvalid(f"{folder} is being written to: its files do not settle")
            self._sleep(MTIME_GRANULARITY_NS / 1e9)
        return Manifest(
            path=place.path,
            generation=generation,
            format=plan.format,
            modules=plan.modules,
            max_rank=plan.max_rank,
            image_bytes=plan.layout.num_bytes,
            file_bytes=plan.file_bytes,
        )

    def _read(self, files: AdapterFiles) -> tuple[AdapterPlan, str]:
        """The plan and the digest of the bytes that it was made from."""
        if is_gguf(files.names):
            return self._read_gguf(files)
        texts = [_read_whole(files, index) for index in _texts(files)]
        headers = _read_headers(files)
        digest = hashlib.blake2b(digest_size=16)
        for part in (*texts, *headers, *_told_apart(files, headers)):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        key = (digest.hexdigest(), _tensor_bytes(files))
        plan = self._cached(key)
        if plan is None:
            plan = self._plan(files, texts, headers)
            self._remember(key, plan)
        return plan, digest.hexdigest()

    def _plan(self, files: AdapterFiles, texts: list[bytes], headers: list[bytes]) -> AdapterPlan:
        config = parse_config(texts[0], CONFIG_NAME)
        tensor_files = _parsed(files, headers)
        for index, text in zip(_texts(files)[1:], texts[1:], strict=True):
            check_index(text, files.names[index], tensor_files)
        read = partial(read_told, fds=files.fds)
        plan = plan_adapter(config, tensor_files, self.base, self.max_lora_rank, read)
        self._check_fits(plan, files)
        return plan

    def _read_gguf(self, files: AdapterFiles) -> tuple[AdapterPlan, str]:
        (identity,) = files.identities
        payload = gguf_header.read_header(files.fds[0], identity.num_bytes)
        header = gguf_header.parse_header(payload, identity.num_bytes, identity.name)
        digest = hashlib.blake2b(payload[: header.num_bytes], digest_size=16).hexdigest()
        plan = plan_gguf(header, self.base, self.max_lora_rank, identity.name)
        self._check_fits(plan, files)
        self._remember((digest, _tensor_bytes(files)), plan)
        return plan, digest

    def _check_fits(self, plan: AdapterPlan, files: AdapterFiles) -> None:
        if plan.layout.num_bytes > self._host_tier_bytes:
            raise AdapterInvalid(
                f"{files.folder}: its image takes {plan.layout.num_bytes} bytes, more than all of"
                f" --host-tier-memory, {self._host_tier_bytes}"
            )

    def _check_identity(self, files: AdapterFiles, source: AdapterSource) -> None:
        if files.identities != source.generation.files:
            raise _changed(files.folder)

    def _cached(self, key: _PlanKey) -> AdapterPlan | None:
        with self._lock:
            plan = self._plans.get(key)
            if plan is not None:
                self._plans.move_to_end(key)
            return plan

    def _remember(self, key: _PlanKey, plan: AdapterPlan) -> None:
        with self._lock:
            self._plans[key] = plan
            while len(self._plans) > NUM_CACHED_PLANS:
                self._plans.popitem(last=False)


def _texts(files: AdapterFiles) -> list[int]:
    """Where the configuration is among the files, and behind it the index if there is one."""
    return [index for index, name in enumerate(files.names) if name.endswith(".json")]


def _tensors(files: AdapterFiles) -> list[tuple[int, str, int]]:
    """Index, name and size of each file with tensors."""
    return [
        (index, identity.name, identity.num_bytes)
        for index, identity in enumerate(files.identities)
        if identity.name.endswith(".safetensors")
    ]


def _tensor_bytes(files: AdapterFiles) -> tuple[int, ...]:
    if is_gguf(files.names):
        return tuple(identity.num_bytes for identity in files.identities)
    return tuple(num_bytes for _, _, num_bytes in _tensors(files))


def _read_headers(files: AdapterFiles) -> list[bytes]:
    """The header of each file with tensors; together they are no larger than a whole file's."""
    headers = []
    num_bytes_left = MAX_HEADER_BYTES
    for index, name, num_bytes in _tensors(files):
        headers.append(read_header(files.fds[index], num_bytes, name))
        num_bytes_left -= len(headers[-1])
        if num_bytes_left < 0:
            raise AdapterInvalid(
                f"{files.folder}: its shards' headers have more than {MAX_HEADER_BYTES} bytes"
            )
    return headers


def _parsed(files: AdapterFiles, headers: list[bytes]) -> list[TensorFile]:
    return [
        TensorFile(index, name, parse_header(header, num_bytes, name))
        for (index, name, num_bytes), header in zip(_tensors(files), headers, strict=True)
    ]


def _told_apart(files: AdapterFiles, headers: list[bytes]) -> list[bytes]:
    """The tensors that a plan depends on beyond the headers: those of some quantized formats."""
    marks = [name.encode() for name in TOLD_WHEN_INSPECTED]
    if not any(mark in header for mark in marks for header in headers):
        return []
    told = [
        StoredTensor(file.index, file.name, tensor)
        for file in _parsed(files, headers)
        for tensor in file.tensors
        if tensor.name.endswith(TOLD_WHEN_INSPECTED)
    ]
    return [read_told(stored, files.fds) for stored in told]


def _read_whole(files: AdapterFiles, index: int) -> bytes:
    num_bytes = files.identities[index].num_bytes
    if num_bytes > MAX_CONFIG_BYTES:
        raise AdapterInvalid(
            f"{files.path(index)} has {num_bytes} bytes, expected at most {MAX_CONFIG_BYTES}"
        )
    payload = os.pread(files.fds[index], num_bytes, 0)
    if len(payload) != num_bytes:
        raise AdapterInvalid(f"{files.path(index)} was cut short while it was read")
    return payload


def _changed(folder: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"the files in {folder} are not those that were registered: they have changed since"
    )
