"""The staging ring's memory: allocated and exported by the engine, written by the loader.

The engine allocates, so that the death of the loader can never take memory away that the engine
reads. ``HostRing`` is the ring of a machine without a GPU: an anonymous file in memory (memfd)
that both processes map; it has no name, so a killed process leaves nothing behind.
"""

import mmap
import os
from typing import Protocol

from ipc.messages import RingGrant, RingKind


class RingTarget(Protocol):
    """The loader's end of a ring, whatever memory it is made of."""

    num_chunks: int
    chunk_bytes: int

    def write(self, chunk: int, offset: int, source: memoryview) -> None:
        """Begins to copy ``source`` to ``[offset, offset + len)`` of a chunk that is FILLING.

        ``source`` must stay as it is until ``synchronize`` of that chunk returns.
        """
        ...

    def synchronize(self, chunk: int) -> None:
        """Returns when every write to the chunk is visible to the engine."""
        ...

    def close(self) -> None:
        """Gives the mapping back; the engine's memory stays."""
        ...


class HostRing:
    """A ring in a memfd: the engine's end (``create``) and the loader's (``attach``) alike."""

    def __init__(self, fd: int, num_chunks: int, chunk_bytes: int) -> None:
        self.fd = fd
        self.num_chunks = num_chunks
        self.chunk_bytes = chunk_bytes
        self._map = mmap.mmap(fd, num_chunks * chunk_bytes)
        self._view = memoryview(self._map)

    @classmethod
    def create(cls, num_chunks: int, chunk_bytes: int) -> "HostRing":
        """Allocates a ring of ``num_chunks * chunk_bytes`` bytes, all of them touched."""
        fd = os.memfd_create("sidestream-ring", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_chunks * chunk_bytes)
        # Taking the pages now turns "out of memory" into an error at start, not a SIGBUS later.
        os.posix_fallocate(fd, 0, num_chunks * chunk_bytes)
        return cls(fd, num_chunks, chunk_bytes)

    @classmethod
    def attach(cls, fd: int, grant: RingGrant) -> "HostRing":
        """Maps the ring of ``grant``; owns ``fd`` from now on."""
        return cls(fd, grant.num_chunks, grant.chunk_bytes)

    def grant_kind(self) -> RingKind:
        return RingKind.HOST

    def chunk(self, chunk: int) -> memoryview:
        """The chunk's bytes, writable."""
        start = chunk * self.chunk_bytes
        return self._view[start : start + self.chunk_bytes]

    def write(self, chunk: int, offset: int, source: memoryview) -> None:
        self.chunk(chunk)[offset : offset + source.nbytes] = source

    def synchronize(self, chunk: int) -> None:
        """Nothing to wait for: ``write`` has returned, and the message that follows orders it."""

    def close(self) -> None:
        self._view.release()
        self._map.close()
        os.close(self.fd)
