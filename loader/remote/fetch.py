"""Brings the adapter at an address into the cache: only the files that it needs, each only once."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from ipc.errors import (
    AdapterInvalid,
    AdapterNotFound,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Unavailable,
)
from ipc.messages import AdapterId
from loader import strict_json
from loader.adapter_files import GGUF_SUFFIX
from loader.peft_files import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_SHARDS,
    TENSORS_NAME,
    TRANSFORMERS_INDEX_NAME,
    is_shard_name,
)
from loader.remote.address import Address, is_allowed, parse_address
from loader.remote.cache import AdapterCache, Entry, EntryFile, EntryRecord
from loader.remote.origin import ChangedFile, InterruptedRead, Origin, RemoteFile
from loader.remote.origins import open_origin
from loader.strict_json import shorten

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 1 << 20
MAX_INDEX_BYTES = 16 << 20
# Tries in a row that bring nothing.
MAX_VAIN_TRIES = 5
_FIRST_PAUSE_S = 0.2
_NICENESS = 10


class Fetcher:
    """Fetches what ``allowed`` prefixes permit, within ``timeout_s`` each.

    ``addresses`` are allowed as well, each by itself. Calls block; several may go on at once, and
    two of one adapter share one transfer. ``open_at`` finds an adapter at its source.
    """

    def __init__(
        self,
        cache: AdapterCache,
        allowed: tuple[str, ...],
        timeout_s: float,
        addresses: tuple[str, ...] = (),
        open_at: Callable[[Address, tuple[str, ...]], Origin] = open_origin,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._allowed = allowed
        self._timeout_s = timeout_s
        self._addresses = frozenset(addresses)
        self._open_at = open_at
        self._sleep = sleep
        self._now_s = now_s
        # Who has not been let go since its fetch began.
        self._wanted: set[AdapterId] = set()

    def fetch(self, adapter_id: AdapterId, path: str) -> str:
        """The adapter at the address ``path``, on disk: an absolute path of a folder or file.

        It stays there until ``let_go``.

        Raises:
            SidestreamError: it is not allowed, not there, not whole, or can not be had in time.
        """
        address = parse_address(path)
        if str(address) not in self._addresses and not is_allowed(address, self._allowed):
            allowed = ", ".join(self._allowed) or "none"
            raise _not_allowed(address, allowed)
        # Reads of files and copies to the device go first. Linux has a niceness for each thread.
        _step_back()
        deadline_s = self._now_s() + self._timeout_s
        self._wanted.add(adapter_id)
        try:
            with closing(self._open_at(address, self._allowed)) as origin:
                folder = self._held(adapter_id, origin, deadline_s)
        except BaseException:
            self.let_go(adapter_id)
            raise
        if adapter_id not in self._wanted:
            self._cache.let_go(adapter_id)
        return str(folder / address.file_name if address.is_file else folder)

    def reopen(self, adapter_id: AdapterId, path: str) -> None:
        """Keeps what an earlier loader has fetched to ``path``; any other path is let be."""
        entry = self._entry_of(path)
        if entry is not None:
            try:
                self._cache.hold(adapter_id, entry)
            except FileNotFoundError:
                raise AdapterInvalid(
                    "the adapter cache needed its room for others while nobody used it: load it"
                    " again"
                ) from None

    def let_go(self, adapter_id: AdapterId) -> None:
        """The adapter is registered no more."""
        self._wanted.discard(adapter_id)
        self._cache.let_go(adapter_id)

    def _held(self, adapter_id: AdapterId, origin: Origin, deadline_s: float) -> Path:
        for _ in range(MAX_VAIN_TRIES):
            entry = self._entry(origin, deadline_s)
            try:
                self._cache.hold(adapter_id, entry.folder)
            except FileNotFoundError:
                continue  # Another server needed the room just now.
            return entry.folder
        raise Unavailable(f"{origin.address}: the adapter cache is too small", retry_after_s=1.0)

    def _entry_of(self, path: str) -> Path | None:
        try:
            below = Path(path).relative_to(self._cache.entries)
        except ValueError:
            return None
        return self._cache.entries / below.parts[0] if below.parts else None

    def _entry(self, origin: Origin, deadline_s: float) -> Entry:
        address = str(origin.address)
        files = list_files(origin)
        tags = tuple((file.name, file.tag) for file in files)
        found = self._cache.find(address, tags)
        if found is not None:
            return found
        num_bytes = sum(file.num_bytes for file in files)
        if num_bytes > self._cache.max_bytes:
            raise AdapterInvalid(
                f"{address} has {num_bytes} bytes, more than --adapter-cache-size"
                f" {self._cache.max_bytes}"
            )
        with self._cache.partial(f"{address} {tags}") as partial:
            # Whoever had it until now may have fetched just this.
            found = self._cache.find(address, tags)
            if found is not None:
                return found
            self._cache.make_room(num_bytes, partial)
            begin_s = self._now_s()
            done = tuple(self._bring(origin, file, partial, deadline_s) for file in files)
            entry = self._cache.add(partial, EntryRecord(1, address, done))
            logger.info(
                "%s: fetched %d bytes in %.1f s", address, num_bytes, self._now_s() - begin_s
            )
            return entry

    def _bring(
        self, origin: Origin, file: RemoteFile, folder: Path, deadline_s: float
    ) -> EntryFile:
        """The file, whole and checked, in ``folder``."""
        path = folder / file.name
        vain, pause_s = 0, _FIRST_PAUSE_S
        while True:
            before = path.stat().st_size if path.exists() else 0
            try:
                digest = self._go_on(origin, file, path, deadline_s)
            except InterruptedRead as interruption:
                has_grown = path.exists() and path.stat().st_size > before
                vain = 0 if has_grown else vain + 1
                if vain >= MAX_VAIN_TRIES:
                    raise interruption.error from interruption
                logger.info("%s: %s, trying again", origin.address, interruption)
                pause_s = _FIRST_PAUSE_S if has_grown else pause_s * 2
                self._sleep(min(pause_s, max(0.0, deadline_s - self._now_s())))
                continue
            except ChangedFile:
                path.unlink(missing_ok=True)
                raise _changed(origin.address, file) from None
            except OSError as error:
                raise Internal(
                    f"adapter cache: {path.name} can not be written: {error.strerror}"
                ) from error
            if file.sha256 is not None and digest != file.sha256:
                path.unlink(missing_ok=True)
                raise AdapterInvalid(
                    f"{origin.address}: {file.name} has the SHA-256 {digest}, its source says"
                    f" {file.sha256}"
                )
            return EntryFile(file.name, file.num_bytes, file.tag, digest)

    def _go_on(self, origin: Origin, file: RemoteFile, path: Path, deadline_s: float) -> str:
        """Reads what is missing of ``path``; the SHA-256 of all of it."""
        digest = hashlib.sha256()
        with open(path, "ab+") as target:
            present = os.fstat(target.fileno()).st_size
            if present > file.num_bytes or (present and not file.can_resume):
                target.truncate(0)
            target.seek(0)
            while piece := target.read(1 << 20):
                digest.update(piece)
            written = target.tell()
            if written < file.num_bytes:
                for piece in origin.read(file, written):
                    if self._now_s() > deadline_s:
                        raise DeadlineExceeded(
                            f"{origin.address}: {written} of {file.num_bytes} bytes of"
                            f" {file.name} came within --adapter-fetch-timeout"
                            f" {self._timeout_s:g} s; what came is kept"
                        )
                    if written + len(piece) > file.num_bytes:
                        raise ChangedFile
                    target.write(piece)
                    digest.update(piece)
                    written += len(piece)
        if written < file.num_bytes:
            raise InterruptedRead(
                Unavailable(
                    f"{origin.address}: {file.name} ended after {written} of"
                    f" {file.num_bytes} bytes",
                    retry_after_s=1.0,
                )
            )
        return digest.hexdigest()


def _step_back() -> None:
    """Gives the calling thread at least ``_NICENESS``."""
    thread = threading.get_native_id()
    if os.getpriority(os.PRIO_PROCESS, thread) < _NICENESS:
        os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)


def list_files(origin: Origin) -> tuple[RemoteFile, ...]:
    """The files that the adapter is made of, and no others.

    Raises:
        AdapterNotFound: there is no adapter.
        AdapterInvalid: a part of it is missing, or it is of another kind.
    """
    address = origin.address
    if address.is_file:
        file = origin.find(address.file_name)
        if file is None:
            raise AdapterNotFound(f"{address}: there is no such file", param="path")
        return (file,)
    config = origin.find(CONFIG_NAME)
    if config is None:
        return (_only_gguf(origin),)
    _check_length(address, config, MAX_TEXT_BYTES)
    tensors = origin.find(TENSORS_NAME)
    if tensors is not None:
        return (config, tensors)
    for index_name in (INDEX_NAME, TRANSFORMERS_INDEX_NAME):
        index = origin.find(index_name)
        if index is not None:
            _check_length(address, index, MAX_INDEX_BYTES)
            return (config, index, *_shards(origin, index))
    raise AdapterInvalid(
        f"{address} has {CONFIG_NAME}, but neither {TENSORS_NAME} nor {INDEX_NAME}"
    )


def _only_gguf(origin: Origin) -> RemoteFile:
    names = origin.names() or []
    ggufs = [name for name in names if name.endswith(GGUF_SUFFIX)]
    file = origin.find(ggufs[0]) if len(ggufs) == 1 else None
    if file is None:
        have = f", but {', '.join(map(shorten, ggufs[:3]))}" if ggufs else ""
        raise AdapterNotFound(
            f"{origin.address} has no {CONFIG_NAME}{have}: expected a folder as PEFT saves it, one"
            f" {GGUF_SUFFIX} file in it, or the address of the file itself",
            param="path",
        )
    return file


def _shards(origin: Origin, index: RemoteFile) -> list[RemoteFile]:
    """The files that an index names: checked, as names that could lead elsewhere."""
    address = origin.address
    payload = _read_text(origin, index)
    parsed = strict_json.parse(payload, index.name)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict):
        raise AdapterInvalid(f"{address}: {index.name} has no weight_map")
    names = sorted({name if isinstance(name, str) else "" for name in weight_map.values()})
    if not 0 < len(names) <= MAX_SHARDS or not all(map(is_shard_name, names)):
        raise AdapterInvalid(
            f"{address}: {index.name} names {shorten(names)}, expected 1 to {MAX_SHARDS} files"
            " adapter_model-0000x-of-0000n.safetensors"
        )
    found = {name: origin.find(name) for name in names}
    for name, file in found.items():
        if file is None:
            raise AdapterInvalid(f"{address}: {index.name} names {name}, which is not there")
    return [file for file in found.values() if file is not None]


def _read_text(origin: Origin, file: RemoteFile) -> bytes:
    payload = bytearray()
    try:
        for piece in origin.read(file, 0):
            payload += piece
            if len(payload) > file.num_bytes:
                raise ChangedFile
    except InterruptedRead as interruption:
        raise interruption.error from interruption
    except ChangedFile:
        raise _changed(origin.address, file) from None
    return bytes(payload)


def _changed(address: Address, file: RemoteFile) -> Unavailable:
    return Unavailable(f"{address}: {file.name} changed while it was fetched", retry_after_s=1.0)


def _check_length(address: Address, file: RemoteFile, most: int) -> None:
    if file.num_bytes > most:
        raise AdapterInvalid(
            f"{address}: {file.name} has {file.num_bytes} bytes, expected at most {most}"
        )


def _not_allowed(address: Address, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"adapter path {address} is below none of the allowed sources ({allowed}); see"
        " --adapter-source",
        param="path",
    )
