"""The staging ring's memory: allocated and exported by the engine, written by the loader.

The engine allocates, so that the death of the loader can never take memory away that the engine
reads. ``HostRing`` is the ring of a machine without a GPU: an anonymous file in memory (memfd)
that both processes map; it has no name, so a killed process leaves nothing behind.
"""

import mmap
import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from ipc.messages import RingGrant, RingKind


class HostRegistrar(Protocol):
    """Makes host memory such that a ring's copies out of it run at full speed."""

    def register(self, memory: memoryview) -> None:
        """Registers ``memory``, which nobody has registered yet, until ``close``.

        Raises:
            Unavailable: the system refuses.
        """
        ...

    def close(self) -> None:
        """Undoes every ``register``; no copy may be under way."""
        ...


class RingTarget(Protocol):
    """The loader's end of a ring, whatever memory it is made of.

    One thread may ``write`` while another one ``synchronize`` s an earlier chunk.
    """

    num_chunks: int
    chunk_bytes: int

    def write(self, chunk: int, sources: Iterable[memoryview]) -> None:
        """Begins to copy ``sources``, one behind the other, to the front of a FILLING chunk.

        They must stay as they are until ``synchronize`` of that chunk returns. Copies are
        completed in the order in which they were begun.
        """
        ...

    def synchronize(self, chunk: int) -> None:
        """Returns when what was written to the chunk is visible to the engine."""
        ...

    def host_registrar(self) -> HostRegistrar | None:
        """What makes host memory fast to copy from, the caller's to close; None: all of it is.

        It and what it registered outlive this target.
        """
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

    def write(self, chunk: int, sources: Iterable[memoryview]) -> None:
        target = np.frombuffer(self.chunk(chunk), np.uint8)
        offset = 0
        for source in sources:
            # Unlike a memoryview's assignment, this lets other threads run meanwhile.
            np.copyto(target[offset : offset + source.nbytes], np.frombuffer(source, np.uint8))
            offset += source.nbytes

    def synchronize(self, chunk: int) -> None:
        """Nothing to wait for: ``write`` has returned, and the message that follows orders it."""

    def host_registrar(self) -> HostRegistrar | None:
        return None

    def close(self) -> None:
        self._view.release()
        self._map.close()
        os.close(self.fd)
