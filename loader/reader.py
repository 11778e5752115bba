"""Reads adapters into their images, many blocks at a time, the most urgent adapter's first.

A read is over once, when none of its blocks is being read any more: with all of the image in place
and its files found unchanged behind the last byte, or with the first error.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from ipc.errors import AdapterInvalid, Cancelled, Internal, SidestreamError
from ipc.trace import NO_TRACE
from loader.blocks import Block, BlockReader, cut, spread
from loader.host_tier import HostImage
from loader.inspector import OpenAdapter
from loader.load_trace import LoadTrace

logger = logging.getLogger(__name__)

# Of a thread that reads, above the process's own: whoever else wants the core gets most of it.
_NICENESS = 10


class ImageRead:
    """One adapter on its way into its image. Its fields belong to the reader's lock."""

    def __init__(
        self, image: HostImage, adapter: OpenAdapter, blocks: Sequence[Block], began_s: float
    ) -> None:
        self.image = image
        self.adapter = adapter
        self.blocks = blocks
        self.began_s = began_s
        self.first_block_s: float | None = None
        self.error: SidestreamError | None = None
        self.num_begun = 0
        self.finished = [False] * len(blocks)
        self.num_finished = 0
        self.num_in_flight = 0

    @property
    def wants_reading(self) -> bool:
        return self.error is None and self.num_begun < len(self.blocks)


class Reader:
    """A fixed number of threads that read blocks. They are daemons: a hung disk ends with us.

    Blocks have ``block_bytes``, or less where an image would not keep all threads busy to its end.
    Threads run at low priority, so that they take only what time the engine's threads leave.

    ``before_block`` is called on the reading thread before each block; ``progressed`` whenever
    more of an image is in place without gaps; ``ended`` once for each read, when no thread touches
    its image or its files any more.
    """

    def __init__(
        self,
        num_threads: int,
        block_bytes: int,
        progressed: Callable[[], None],
        ended: Callable[[ImageRead], None],
        before_block: Callable[[Block], None] | None = None,
        trace: LoadTrace | None = None,
    ) -> None:
        self._block_bytes = block_bytes
        self._progressed = progressed
        self._ended = ended
        self._before_block = before_block
        self._trace = LoadTrace(NO_TRACE) if trace is None else trace
        self._changed = threading.Condition()
        self._reads: list[ImageRead] = []
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"reader-{index}", daemon=True)
            for index in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Begins no further block; waits for those in flight, ``timeout_s`` at most in all."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def begin(self, image: HostImage, adapter: OpenAdapter) -> ImageRead:
        """Begins to fill ``image``, as the least urgent. Owns ``adapter.files`` from now on."""
        num_bytes = adapter.plan.layout.num_bytes
        blocks = cut(adapter.plan, spread(num_bytes, len(self._threads), self._block_bytes))
        read = ImageRead(image, adapter, blocks, time.monotonic())
        with self._changed:
            self._reads.append(read)
            self._changed.notify_all()
        return read

    def order(self, reads: Sequence[ImageRead]) -> None:
        """These first, in this order; blocks that are being read already go on."""
        with self._changed:
            first = [read for read in reads if read in self._reads]
            self._reads = first + [read for read in self._reads if read not in first]

    def cancel(self, read: ImageRead) -> None:
        """The read ends as soon as its blocks in flight do. Without effect once it has ended."""
        with self._changed:
            self._fail(read, Cancelled("the read is not wanted any more"))
            over = self._take_if_over(read)
        if over:
            self._finish(read)

    def _run(self) -> None:
        # Linux keeps a niceness for each thread.
        os.nice(_NICENESS)
        block_reader = BlockReader()
        work = self._wait_for_block()
        while work is not None:
            read, index = work
            error = self._read_block(block_reader, read, index)
            # Once a block: with many threads, each time counts that one waits for the interpreter.
            with self._changed:
                read.num_in_flight -= 1
                if error is not None:
                    self._fail(read, error)
                has_advanced = error is None and self._advance(read, index)
                over = self._take_if_over(read)
                work = self._next_block()
            if over:
                self._finish(read)
            elif has_advanced:
                self._progressed()
            if work is None:
                work = self._wait_for_block()

    def _wait_for_block(self) -> tuple[ImageRead, int] | None:
        """The next block to be read; None once there will be no more."""
        with self._changed:
            while (work := self._next_block()) is None and not self._stopping:
                self._changed.wait()
        return work

    def _next_block(self) -> tuple[ImageRead, int] | None:
        if self._stopping:
            return None
        for read in self._reads:
            if read.wants_reading:
                if read.first_block_s is None:
                    read.first_block_s = time.monotonic()
                read.num_begun += 1
                read.num_in_flight += 1
                return read, read.num_begun - 1
        return None

    def _read_block(
        self, block_reader: BlockReader, read: ImageRead, index: int
    ) -> SidestreamError | None:
        block, files = read.blocks[index], read.adapter.files
        try:
            if self._before_block is not None:
                self._before_block(block)
            block_reader.read(block, read.image, files, read.adapter.plan)
        except SidestreamError as error:
            return error
        except OSError as error:
            return AdapterInvalid(f"can not read {files.folder}: {error.strerror}")
        except Exception as error:
            logger.exception("reading %s failed", files.folder)
            return Internal(f"reading {files.folder} failed: {error}")
        return None

    def _advance(self, read: ImageRead, index: int) -> bool:
        """Takes in a finished block; whether more of the image is in place without gaps."""
        read.finished[index] = True
        num_before = read.num_finished
        while read.num_finished < len(read.blocks) and read.finished[read.num_finished]:
            read.image.num_ready = read.blocks[read.num_finished].stop
            read.num_finished += 1
        return read.num_finished > num_before

    def _fail(self, read: ImageRead, error: SidestreamError) -> None:
        if read.error is None:
            read.error = error

    def _take_if_over(self, read: ImageRead) -> bool:
        """True for exactly one caller: the one who must finish the read."""
        if read not in self._reads or read.num_in_flight or read.wants_reading:
            return False
        self._reads.remove(read)
        return True

    def _finish(self, read: ImageRead) -> None:
        files = read.adapter.files
        try:
            if read.error is None:
                files.check_unchanged()
                read.image.read_s = time.monotonic() - read.began_s
                assert read.first_block_s is not None
                self._trace.read(
                    files.folder,
                    read.image.generation.counter,
                    read.image.num_bytes,
                    read.first_block_s,
                    time.monotonic(),
                )
                read.image.verified = True
        except SidestreamError as error:
            read.error = error
        except OSError as error:
            read.error = AdapterInvalid(f"can not look at {files.folder}: {error.strerror}")
        finally:
            files.close()
        self._progressed()
        self._ended(read)
