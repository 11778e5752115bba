"""The sockets of one running server: all lie in its run folder, which only its user may enter."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ipc.errors import InvalidRequest, Unavailable

_PREFIX = "sidestream-run-"
_LONGEST_NAME = "handover.sock"
_CATALOG_NAME = "adapters.json"
# sun_path of a Unix socket's address, less its final zero.
_MAX_SOCKET_PATH_BYTES = 107


class RunFolder:
    """Names of what the processes of one server meet at, and who of them is still there.

    A process holds a shared lock on the folder from ``enter`` on. The kernel drops it when the
    process ends, however it ends, so whoever gets the exclusive lock in ``leave`` is the last one:
    what dead processes left behind is nobody's then, and goes with the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    @classmethod
    def create(cls, parents: Iterable[Path]) -> "RunFolder":
        """A new folder of mode 0700, entered, in the first of ``parents`` that can have one.

        What servers left there whose every process was killed at once is removed on the way.

        Raises:
            Unavailable: none of ``parents`` can.
        """
        reasons: list[str] = []
        for parent in parents:
            longest = parent / f"{_PREFIX}12345678" / _LONGEST_NAME
            if len(os.fsencode(longest)) > _MAX_SOCKET_PATH_BYTES:
                reasons.append(f"{parent}: too long for the path of a Unix socket")
                continue
            try:
                _sweep(parent)
                return cls._create_in(parent)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
        raise Unavailable(f"no place for the run folder ({'; '.join(reasons)})")

    @classmethod
    def _create_in(cls, parent: Path) -> "RunFolder":
        while True:
            folder = cls(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent)))
            folder.enter()
            # Another server's sweep may have come between the two calls; none can from here on.
            if folder.path.exists():
                return folder
            folder.leave()

    @classmethod
    def of_running_server(cls, parents: Iterable[Path]) -> "RunFolder":
        """The run folder of the one server of this user's that runs, if it lies in ``parents``.

        What servers left there whose every process was killed at once is removed on the way.

        Raises:
            Unavailable: no server runs.
            InvalidRequest: several do.
        """
        found: set[Path] = set()
        for parent in parents:
            _sweep(parent)
            found.update(path for path in parent.glob(f"{_PREFIX}*") if _is_ours(path))
        if not found:
            raise Unavailable("no server of this user's runs on this machine")
        if len(found) > 1:
            folders = ", ".join(map(str, sorted(found)))
            raise InvalidRequest(
                f"server: expected the run folder of one of {len(found)} running servers"
                f" ({folders}), got none"
            )
        return cls(found.pop())

    @property
    def rpc_endpoint(self) -> str:
        """ZeroMQ endpoint at which the engine serves clients."""
        return f"ipc://{self.path / 'rpc.sock'}"

    @property
    def loader_endpoint(self) -> str:
        """ZeroMQ endpoint at which the engine meets its loader."""
        return f"ipc://{self.path / 'loader.sock'}"

    @property
    def handover_path(self) -> Path:
        """Unix socket over which descriptors are handed to and by the engine."""
        return self.path / _LONGEST_NAME

    @property
    def catalog_path(self) -> Path:
        """Where the adapter catalog lies when no other place was chosen."""
        return self.path / _CATALOG_NAME

    def enter(self) -> None:
        """Keeps the folder in place while this process lives. A folder that is gone stays gone."""
        if self._lock_fd is not None:
            return
        try:
            self._lock_fd = _open_folder(self.path)
        except OSError:
            return
        # Waits at most for a sweep, which takes as long as to remove an empty folder.
        fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Removes the folder if no other process is in it: the last one out does.

        Of several that leave at once each first gives its shared lock up and then asks for the
        exclusive one, so at least one of them gets it.
        """
        self._unlock()
        try:
            fd = _open_folder(self.path)
        except OSError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_folder(self.path)
        except OSError:
            pass  # Somebody is in it, and will be the last.
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Removes the folder and all in it: for the supervisor, which has seen its children end."""
        self._unlock()
        with contextlib.suppress(OSError):
            _remove_folder(self.path)

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def run_folder_parents() -> list[Path]:
    """Where a run folder may be made, the best place first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = [Path(runtime)] if runtime else []
    return [*places, Path(tempfile.gettempdir()), Path("/tmp")]


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        if _is_ours(path):
            RunFolder(path).leave()


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _remove_folder(path: Path) -> None:
    """Raises ``OSError``, and leaves the folder, when it holds anything that is not ours."""
    for entry in path.iterdir():
        if entry.is_socket() or entry.name.startswith(_CATALOG_NAME):
            entry.unlink(missing_ok=True)
    path.rmdir()
