"""Fetched adapters on disk, bounded, shared by all servers of a user.

| in the cache's folder  | what it is                                                           |
|------------------------|----------------------------------------------------------------------|
| ``entries/<content>/`` | an adapter, whole: its files and ``.entry.json``; named by its hash   |
| ``partial/<fetch>/``   | files that are being fetched, or were when a process ended           |
| ``lock``               | held while entries come and go                                       |

There is no index: what lies there is what there is, and what is damaged is removed when it is met.
An entry appears by one rename, when its files are on the disk. Whoever may still read one holds a
shared lock on its ``.entry.json``; locks end with the process that has them, so nothing stays in
use. Others make room for new ones, the longest unused first.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ipc.errors import Internal, Overloaded
from ipc.messages import AdapterId

logger = logging.getLogger(__name__)

ENTRY_NAME = ".entry.json"
_VERSION = 1


class EntryFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of an adapter's files; ``tag`` as in ``RemoteFile``."""

    name: str
    num_bytes: int
    tag: str
    sha256: str


class EntryRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lies beside an entry's files: where they came from, and what they have to be."""

    version: int
    address: str
    files: tuple[EntryFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole adapter in the cache."""

    folder: Path
    record: EntryRecord

    @property
    def is_sound(self) -> bool:
        """Whether all files are there, as long as they should be."""
        try:
            return all(
                (self.folder / file.name).stat().st_size == file.num_bytes
                for file in self.record.files
            )
        except OSError:
            return False


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/sidestream/adapters``, or the same below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "sidestream" / "adapters"


class AdapterCache:
    """At most ``max_bytes`` of adapters below ``folder``. Safe to use from many threads."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        # Who names an entry later does it without symbolic links.
        self.folder = folder.resolve()
        self.max_bytes = max_bytes
        self._held: dict[AdapterId, int] = {}
        # What fetches of this process will have taken at their end, by their folders.
        self._reserved: dict[Path, int] = {}

    @property
    def entries(self) -> Path:
        """What whole adapters lie below."""
        return self.folder / "entries"

    def open(self) -> None:
        """Makes the folders, and takes away what a crash has left half removed.

        Raises:
            Internal: it can not be written to.
        """
        try:
            for folder in (self.entries, self._partial):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                for gone in folder.glob(".*.gone"):
                    shutil.rmtree(gone, ignore_errors=True)
        except OSError as error:
            raise Internal(f"adapter cache {self.folder}: {error.strerror}") from error

    def find(self, address: str, tags: tuple[tuple[str, str], ...]) -> Entry | None:
        """The entry that was fetched from ``address`` when its files had these ``(name, tag)``."""
        if not all(tag for _, tag in tags):
            return None
        for entry in self._all():
            record = entry.record
            same = tuple((file.name, file.tag) for file in record.files) == tags
            if same and record.address == address and entry.is_sound:
                return entry
        return None

    @contextlib.contextmanager
    def partial(self, key: str) -> Iterator[Path]:
        """The folder in which the fetch called ``key`` goes on where an earlier one stopped.

        Nobody else has it meanwhile, in this process or in another: it is waited for.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        self.open()
        with _locked(self._partial / f"{name}.lock", fcntl.LOCK_EX):
            folder = self._partial / name
            folder.mkdir(exist_ok=True, mode=0o700)
            try:
                yield folder
            finally:
                self._reserved.pop(folder, None)
            with contextlib.suppress(OSError):
                (self._partial / f"{name}.lock").unlink()

    def add(self, partial: Path, record: EntryRecord) -> Entry:
        """Makes the files in ``partial``, which are whole, an entry; ``partial`` is gone then.

        Raises:
            Internal: the disk does not take it.
        """
        target = self.entries / _content_of(record)
        try:
            (partial / ENTRY_NAME).write_bytes(msgspec.json.encode(record))
            for name in (*(file.name for file in record.files), ENTRY_NAME):
                _sync(partial / name)
            _sync(partial)
            with self._lock():
                found = self._read(target)
                if found is not None and found.is_sound:
                    # The same came from elsewhere.
                    shutil.rmtree(partial)
                    return found
                if target.exists():
                    _remove(target)
                os.rename(partial, target)
                _sync(self.entries)
        except OSError as error:
            raise Internal(f"adapter cache {self.folder}: {error.strerror}") from error
        return Entry(target, record)

    def make_room(self, num_bytes: int, beside: Path) -> None:
        """Removes what is longest unused until ``num_bytes`` more than in ``beside`` fit.

        Raises:
            Overloaded: all that is left is in use.
        """
        with self._lock():
            others = [
                each
                for each in self._partial.iterdir()
                if each != beside and each.is_dir() and not each.name.startswith(".")
            ]
            idle = sorted(
                [(_last_use(entry.folder), entry.folder) for entry in self._all()]
                + [(_last_use(folder), folder) for folder in others]
            )
            sizes = {
                folder: max(_size(folder), self._reserved.get(folder, 0)) for _, folder in idle
            }
            used = sum(sizes.values())
            for folder, size in sizes.items():
                if used + num_bytes <= self.max_bytes:
                    break
                if self._remove_unused(folder):
                    logger.info("adapter cache: %s made room of %d bytes", folder.name, size)
                    used -= size
            if used + num_bytes > self.max_bytes:
                raise Overloaded(
                    f"adapter cache {self.folder} has no room: {num_bytes} bytes needed,"
                    f" {used} of --adapter-cache-size {self.max_bytes} are in use"
                )
            self._reserved[beside] = num_bytes

    def hold(self, adapter_id: AdapterId, entry: Path) -> None:
        """Keeps an entry, as used now, until ``let_go``.

        Raises:
            FileNotFoundError: it has made room for another.
        """
        record = entry / ENTRY_NAME
        fd = os.open(record, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            os.utime(record)
        before = self._held.pop(adapter_id, None)
        self._held[adapter_id] = fd
        if before is not None:
            os.close(before)
        if not record.exists():
            self.let_go(adapter_id)
            raise FileNotFoundError(record)

    def let_go(self, adapter_id: AdapterId) -> None:
        """The adapter's files are needed no more; without effect if none are held."""
        fd = self._held.pop(adapter_id, None)
        if fd is not None:
            os.close(fd)

    @property
    def _partial(self) -> Path:
        return self.folder / "partial"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.open()
        with _locked(self.folder / "lock", fcntl.LOCK_EX):
            yield

    def _all(self) -> list[Entry]:
        try:
            folders = [each for each in self.entries.iterdir() if not each.name.startswith(".")]
        except FileNotFoundError:
            return []
        found = []
        for folder in folders:
            try:
                entry = self._read(folder)
            except OSError as error:
                # As where there are no descriptors left: it says nothing of the entry.
                logger.warning("adapter cache: %s can not be read: %s", folder, error)
                continue
            if entry is not None:
                found.append(entry)
            elif self._remove_unused(folder):
                logger.warning("adapter cache: %s was damaged, and is removed", folder)
        return found

    def _read(self, folder: Path) -> Entry | None:
        try:
            text = (folder / ENTRY_NAME).read_bytes()
            record = msgspec.json.decode(text, type=EntryRecord)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return Entry(folder, record) if record.version == _VERSION else None

    def _remove_unused(self, folder: Path) -> bool:
        """Whether nobody held ``folder``, which is gone then."""
        is_entry = folder.parent == self.entries
        lock = folder / ENTRY_NAME if is_entry else folder.with_name(f"{folder.name}.lock")
        try:
            fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            _remove(folder)
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        else:
            _remove(folder)
            return True
        finally:
            os.close(fd)


def _content_of(record: EntryRecord) -> str:
    files = sorted((file.name, file.num_bytes, file.sha256) for file in record.files)
    return hashlib.sha256(msgspec.json.encode(files)).hexdigest()


@contextlib.contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, operation)
            # Whoever had it may have removed it: then it is nobody's lock any more.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    yield
                    return
        finally:
            os.close(fd)


def _remove(folder: Path) -> None:
    """At once for everybody else: files of a folder that is half removed are never met."""
    gone = folder.with_name(f".{folder.name}.gone")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _size(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    return 0


def _last_use(folder: Path) -> float:
    record = folder / ENTRY_NAME
    with contextlib.suppress(OSError):
        return (record if record.exists() else folder).stat().st_mtime
    return 0.0


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
