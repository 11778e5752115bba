"""Opens an adapter's files, only under the allowed roots, and tells whether they have changed.

Where a file lies is decided on the open descriptor (``/proc/self/fd``), not on its path: a path
can be turned into another file's between a check and an open.
"""

import errno
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ipc.errors import (
    AdapterInvalid,
    AdapterNotFound,
    InvalidRequest,
    SidestreamError,
    Unavailable,
)
from ipc.messages import FileIdentity

# A file's mtime comes from a clock that some kernels advance in steps of up to 10 ms: a file that
# was written twice within a step looks the same after both.
MTIME_GRANULARITY_NS = 20_000_000
SETTLE_TIMEOUT_S = 2.0

GGUF_SUFFIX = ".gguf"

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells that a file was written to while it was open.

    The change time can not be set back, unlike the modification time; it does not belong to a
    file's identity, because links and permissions move it as well.
    """

    identity: FileIdentity
    ctime_ns: int
    num_links: int

    def is_other_than(self, earlier: "_Stamp") -> bool:
        if self.identity != earlier.identity:
            return True
        # A file that was replaced or removed by name has lost a link; its bytes are what they were.
        return self.ctime_ns != earlier.ctime_ns and self.num_links >= earlier.num_links


class AdapterFiles:
    """The open files of one adapter, as they were when they were opened. Owns its descriptors."""

    def __init__(self, folder: str, names: Sequence[str], fds: Sequence[int]) -> None:
        self.folder = folder
        self.names = tuple(names)
        self.fds = tuple(fds)
        self._closed = False
        self._stamps = tuple(self._stamp(index) for index in range(len(fds)))

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        return tuple(stamp.identity for stamp in self._stamps)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, self.names[index])

    def append(self, name: str, payload: bytes) -> None:
        """Adds a file in memory that holds ``payload``, behind all others.

        It is no part of what the adapter is, ``identities``, and can not change.
        """
        fd = os.memfd_create(name)
        self.names, self.fds = (*self.names, name), (*self.fds, fd)
        with memoryview(payload) as view:
            written = 0
            while written < len(view):
                written += os.write(fd, view[written:])

    def check_unchanged(self) -> None:
        """Raises ``AdapterInvalid`` if a file was written to since it was opened."""
        for index, stamp in enumerate(self._stamps):
            if self._stamp(index).is_other_than(stamp):
                raise AdapterInvalid(f"{self.path(index)} changed while it was read")

    def settled(self) -> bool:
        """Whether any later write is certain to change a file's identity."""
        now = time.time_ns()
        return all(
            abs(now - stamp.identity.mtime_ns) >= MTIME_GRANULARITY_NS for stamp in self._stamps
        )

    def close(self) -> None:
        """Closes every descriptor; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            for fd in self.fds:
                os.close(fd)

    def _stamp(self, index: int) -> _Stamp:
        status = os.fstat(self.fds[index])
        identity = FileIdentity(
            self.names[index], status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        )
        return _Stamp(identity, status.st_ctime_ns, status.st_nlink)


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """Where an adapter lies: all of ``folder``, or the one file in it that is called ``name``."""

    folder: str
    name: str | None = None

    @property
    def path(self) -> str:
        return self.folder if self.name is None else os.path.join(self.folder, self.name)


class AdapterFolders:
    """The folders in which adapters may lie. Stateless beyond its configuration."""

    def __init__(self, roots: Sequence[str], lora_dir: str | None) -> None:
        self._lora_dir = lora_dir
        allowed = [*roots, *([] if lora_dir is None else [lora_dir])]
        self._roots = tuple(os.path.realpath(root) for root in allowed)

    def resolve(self, path: str) -> AdapterPlace:
        """The folder or GGUF file at ``path``, absolute; its folder is free of symbolic links.

        Raises:
            InvalidRequest: the path is not absolute, or leads outside of the allowed roots.
            AdapterNotFound: there is nothing.
            AdapterInvalid: there is something else.
        """
        if not os.path.isabs(path) or "\0" in path:
            raise InvalidRequest(f"adapter path {path!r} is not an absolute path", param="path")
        try:
            real = os.path.realpath(path)
            self._check_allowed(path, real)
            status = os.stat(real)
        except (FileNotFoundError, NotADirectoryError):
            raise AdapterNotFound(f"no adapter folder at {path}", param="path") from None
        except OSError as error:
            raise _cannot("look at", path, error) from error
        folder, name = os.path.split(path)
        # A link to it may be: a hub's cache has links to files whose names are hashes.
        if stat.S_ISREG(status.st_mode) and name.endswith(GGUF_SUFFIX):
            return AdapterPlace(os.path.realpath(folder), name)
        if not stat.S_ISDIR(status.st_mode):
            raise AdapterInvalid(
                f"{path} is no folder; expected one as PEFT saves, or a {GGUF_SUFFIX} file",
                param="path",
            )
        return AdapterPlace(real)

    def resolve_name(self, name: str) -> AdapterPlace:
        """The adapter called ``name`` in the adapter folder: ``name/`` or ``name.gguf``.

        Raises:
            InvalidRequest: the name could lead elsewhere.
            AdapterNotFound: there is no adapter folder, or nothing of that name in it.
            AdapterInvalid: there are both.
        """
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise InvalidRequest(f"adapter name {name!r} is not a folder's name", param="model")
        if self._lora_dir is None:
            raise AdapterNotFound(f"no adapter is called {name!r}", param="model")
        path = os.path.join(self._lora_dir, name)
        gguf_path = path + GGUF_SUFFIX
        if os.path.isfile(gguf_path):
            if os.path.isdir(path):
                raise AdapterInvalid(
                    f"{self._lora_dir} has {name}/ and {name}{GGUF_SUFFIX}: expected one adapter"
                    f" called {name!r}",
                    param="model",
                )
            path = gguf_path
        elif not os.path.isdir(path):
            raise AdapterNotFound(f"no adapter is called {name!r}", param="model")
        try:
            return self.resolve(path)
        except AdapterNotFound:
            raise AdapterNotFound(f"no adapter is called {name!r}", param="model") from None

    def list_names(self) -> list[str]:
        """Names of the adapters in the adapter folder, sorted; hidden ones are left out."""
        if self._lora_dir is None:
            return []
        try:
            with os.scandir(self._lora_dir) as entries:
                names = {_adapter_name(entry) for entry in entries}
                return sorted(name for name in names if name is not None)
        except OSError as error:
            raise _cannot("list", self._lora_dir, error) from error

    def open(self, folder: str, names: Sequence[str]) -> AdapterFiles:
        """Opens the files ``names`` of a resolved ``folder``; links out of the roots are refused.

        Raises:
            AdapterInvalid: a file is missing, is no regular file, or can not be opened.
            AdapterNotFound: the folder is gone.
            InvalidRequest: a file lies outside of the allowed roots.
        """
        fds: list[int] = []
        try:
            for name in names:
                fds.append(self._open_file(folder, name))
            return AdapterFiles(folder, names, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _open_file(self, folder: str, name: str) -> int:
        path = os.path.join(folder, name)
        try:
            # Non-blocking, lest a FIFO of that name holds the thread for ever.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            if not os.path.isdir(folder):
                raise AdapterNotFound(f"no adapter folder at {folder}", param="path") from None
            raise AdapterInvalid(f"{folder} has no {name}") from None
        except OSError as error:
            raise _cannot("open", path, error) from error
        try:
            self._check_allowed(path, os.readlink(f"/proc/self/fd/{fd}"))
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise AdapterInvalid(f"{path} is no regular file")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_allowed(self, path: str, real: str) -> None:
        for root in self._roots:
            if real == root or real.startswith(root.rstrip("/") + "/"):
                return
        roots = ", ".join(self._roots) or "none"
        raise InvalidRequest(
            f"adapter path {path} lies outside of the allowed roots ({roots})", param="path"
        )


def _cannot(verb: str, path: str, error: OSError) -> SidestreamError:
    message = f"can not {verb} {path}: {error.strerror}"
    if error.errno in _SHORTAGES:
        return Unavailable(message, retry_after_s=1.0)
    return AdapterInvalid(message)


def _adapter_name(entry: os.DirEntry[str]) -> str | None:
    """What an entry of the adapter folder is called as an adapter; None: it is none."""
    if entry.name.startswith(".") or not _is_text(entry.name):
        return None
    if entry.is_dir():
        return entry.name
    is_gguf = entry.name.endswith(GGUF_SUFFIX) and entry.is_file()
    return entry.name.removesuffix(GGUF_SUFFIX) if is_gguf else None


def _is_text(name: str) -> bool:
    """Whether a file's name can travel in a message."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
