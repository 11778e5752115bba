"""Keeps computed values on disk from one start of the loader to the next, in one folder.

A file is called after a key, which is a hash of all that its values depend on, and holds

| bytes | hold                                      |
|-------|-------------------------------------------|
| 8     | ``SSROWS01``                              |
| 32    | the payload's BLAKE2b digest              |
| rest  | the payload                               |

It is written beside its place and moved there, so that several loaders may share a folder. What is
damaged, or of another length than expected, is as good as absent. No error is raised to whoever
asks: without a folder that can be written everything is computed again.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_MAGIC = b"SSROWS01"
_DIGEST_BYTES = 32
_HEAD_BYTES = len(_MAGIC) + _DIGEST_BYTES
_SUFFIX = ".rows"
_PART_PREFIX = ".part-"


def default_folder() -> Path | None:
    """``$XDG_CACHE_HOME/sidestream/row-scales``, or below ``~/.cache``; None without a home."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        parent = Path(cache)
    elif home := os.environ.get("HOME"):
        parent = Path(home) / ".cache"
    else:
        return None
    return parent / "sidestream" / "row-scales"


class DerivedStore:
    """Payloads by key in ``folder``, which is made on first use, if any.

    The least recently used ones leave it, so that all together take ``max_bytes`` at most. Safe to
    use from many threads and processes.
    """

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def find(self, key: str, num_bytes: int) -> bytes | None:
        """The payload of ``num_bytes`` that was kept as ``key``, now the most recently used."""
        if self._folder is None:
            return None
        path = self._path(self._folder, key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("can not read %s: %s", path, error.strerror)
            return None
        head, payload = content[:_HEAD_BYTES], content[_HEAD_BYTES:]
        if head != _head(payload) or len(payload) != num_bytes:
            logger.warning("%s is damaged: what it should hold is computed again", path)
            return None
        return payload

    def keep(self, key: str, payload: bytes) -> None:
        """Keeps ``payload``; others leave for it."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(self._folder, key, payload)
            self._trim(self._folder)
        except OSError as error:
            logger.warning(
                "what was computed can not be kept in %s: %s", self._folder, error.strerror
            )

    def _write(self, folder: Path, key: str, payload: bytes) -> None:
        fd, name = tempfile.mkstemp(dir=folder, prefix=_PART_PREFIX, suffix=_SUFFIX)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(_head(payload))
                file.write(payload)
            os.replace(name, self._path(folder, key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _trim(self, folder: Path) -> None:
        """Removes files, those of writers that died included, the least recently used first."""
        files = []
        for path in folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        num_bytes = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if num_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            num_bytes -= size

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{key}{_SUFFIX}"


def _head(payload: bytes) -> bytes:
    return _MAGIC + hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest()
