"""Pins the host tier's memory in the background, one segment after the other.

A GPU copies at full speed only from memory that its driver has pinned. Pinning takes a good part
of a second per GiB, nearly all of it for the system to find the pages and to clear them; so they
are touched first, by several threads, and the tier serves as soon as its first segment is pinned.
"""

import ctypes
import logging
import mmap
import threading
import time
from collections.abc import Callable, Sequence

from ipc.errors import Internal, SidestreamError
from ipc.ring_memory import HostRegistrar

logger = logging.getLogger(__name__)

NUM_TOUCH_THREADS = 4
# Linux 5.14 and later; Python has no name for it.
_MADV_POPULATE_WRITE = 23


class Pinner:
    """Registers ``segments`` in their order. Owns ``registrar``.

    ``pinned`` is told after each segment how many bytes in front are pinned by now, ``failed`` at
    most once why no more will be. Both are called on the pinner's thread.
    """

    def __init__(
        self,
        segments: Sequence[memoryview],
        registrar: HostRegistrar,
        pinned: Callable[[int], None],
        failed: Callable[[SidestreamError], None],
    ) -> None:
        self._segments = segments
        self._registrar = registrar
        self._pinned = pinned
        self._failed = failed
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pinner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Gives everything back. No copy out of the memory may be under way.

        If the segment that is being pinned takes longer than ``timeout_s``, nothing is: the
        system takes it at the end of the process, which is near.
        """
        self._stopping = True
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._registrar.close()

    def _run(self) -> None:
        began_s, num_bytes = time.monotonic(), 0
        try:
            for segment in self._segments:
                if self._stopping:
                    return
                touch(segment)
                self._registrar.register(segment)
                num_bytes += segment.nbytes
                self._pinned(num_bytes)
        except SidestreamError as error:
            self._failed(error)
        except Exception as error:
            logger.exception("pinning failed")
            self._failed(Internal(f"the host tier could not be pinned: {error}"))
        else:
            taken_s = time.monotonic() - began_s
            logger.info("pinned %d bytes of the host tier in %.2f s", num_bytes, taken_s)


def touch(memory: memoryview) -> None:
    """Every page of ``memory``, which begins at one, is there, if the system has that many."""
    share = -(-memory.nbytes // (NUM_TOUCH_THREADS * mmap.PAGESIZE)) * mmap.PAGESIZE
    threads = [
        threading.Thread(target=_populate, args=(memory[start : start + share],), daemon=True)
        for start in range(0, memory.nbytes, share)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _populate(memory: memoryview) -> None:
    # Not the madvise of Python's mmap, which holds up every other thread. That an older kernel
    # does not know this advice does no harm: pinning then touches the pages itself.
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(memory.nbytes), _MADV_POPULATE_WRITE)
