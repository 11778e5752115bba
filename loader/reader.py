"""Reads adapters into their images, many blocks at a time, the most urgent adapter's first.

A thread that reads stays with one image, in one call without the GIL, until it has no block left or
another image's turn has come: no block waits for the interpreter. What the threads finish meanwhile
is told by a thread of its own, which they wake.

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
from loader.blocks import Block, cut, spread
from loader.host_tier import HostImage
from loader.inspector import OpenAdapter
from loader.load_trace import LoadTrace
from loader.shared_blocks import NO_EVENT, BlockReader, FinishedBlocks, SharedBlocks

logger = logging.getLogger(__name__)

# Of a thread that reads, above the process's own: whoever else wants the core gets most of it.
_NICENESS = 10


class ImageRead:
    """One adapter on its way into its image. Its fields belong to the reader's lock."""

    def __init__(
        self, image: HostImage, adapter: OpenAdapter, blocks: SharedBlocks, began_s: float
    ) -> None:
        self.image = image
        self.adapter = adapter
        self.blocks = blocks
        self.began_s = began_s
        self.first_block_s: float | None = None
        self.error: SidestreamError | None = None
        self.num_finished = 0
        self.num_threads = 0

    @property
    def wants_reading(self) -> bool:
        return self.error is None and self.blocks.num_begun < self.blocks.table.num_blocks


class Reader:
    """A fixed number of threads that read blocks. They are daemons: a hung disk ends with us.

    Blocks have ``block_bytes``, or less where an image would not keep all threads busy to its end.
    Threads run at low priority, so that they take only what time the engine's threads leave.

    ``before_block`` is called on the reading thread before each block; ``progressed`` soon after
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
        self._num_threads = num_threads
        self._event = NO_EVENT
        self._threads = [
            threading.Thread(target=self._run, name=f"reader-{index}", daemon=True)
            for index in range(num_threads)
        ]
        self._threads.append(threading.Thread(target=self._tell, name="read-teller", daemon=True))

    def start(self) -> None:
        self._event = os.eventfd(0)
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Begins no further block; waits for those in flight, ``timeout_s`` at most in all."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._stopping = True
            for read in self._reads:
                read.blocks.halt()
            self._changed.notify_all()
        if self._event != NO_EVENT:
            os.eventfd_write(self._event, 1)
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        # A thread that hangs would signal whatever has the descriptor's number by then.
        if self._event != NO_EVENT and not any(thread.is_alive() for thread in self._threads):
            os.close(self._event)
            self._event = NO_EVENT

    def begin(self, image: HostImage, adapter: OpenAdapter) -> ImageRead:
        """Begins to fill ``image``, as the least urgent. Owns ``adapter.files`` from now on."""
        num_bytes = adapter.plan.layout.num_bytes
        began_s = time.monotonic()
        table = cut(adapter.plan, spread(num_bytes, self._num_threads, self._block_bytes))
        read = ImageRead(image, adapter, SharedBlocks(table), began_s)
        with self._changed:
            self._reads.append(read)
            self._changed.notify_all()
        return read

    def order(self, reads: Sequence[ImageRead]) -> None:
        """These first, in this order; blocks that are being read already go on."""
        with self._changed:
            first = [read for read in reads if read in self._reads]
            self._reads = first + [read for read in self._reads if read not in first]
            for read in [read for read in self._reads if read.wants_reading][1:]:
                read.blocks.halt()

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
        block_reader = BlockReader(self._before_block)
        finished = FinishedBlocks()
        while (read := self._wait_for_blocks()) is not None:
            error = self._read_blocks(block_reader, read)
            with self._changed:
                read.num_threads -= 1
                if error is not None:
                    self._fail(read, error)
                has_advanced = self._advance(read, finished)
                over = self._take_if_over(read)
            if over:
                self._finish(read)
            elif has_advanced:
                self._progressed()

    def _tell(self) -> None:
        """Tells of what is finished while the threads that read go on."""
        finished = FinishedBlocks()
        while True:
            os.eventfd_read(self._event)
            with self._changed:
                if self._stopping:
                    return
                num_advanced = sum(self._advance(read, finished) for read in self._reads)
            if num_advanced:
                self._progressed()

    def _wait_for_blocks(self) -> ImageRead | None:
        """What the calling thread reads next; None once it shall read no more."""
        with self._changed:
            while not self._stopping:
                for read in self._reads:
                    if read.wants_reading:
                        # It may have been halted for one that has no block left by now.
                        read.blocks.go_on()
                        read.num_threads += 1
                        if read.first_block_s is None:
                            read.first_block_s = time.monotonic()
                        return read
                self._changed.wait()
        return None

    def _read_blocks(self, block_reader: BlockReader, read: ImageRead) -> SidestreamError | None:
        files = read.adapter.files
        try:
            block_reader.read(read.blocks, read.image, files, read.adapter.plan, self._event)
        except SidestreamError as error:
            return error
        except OSError as error:
            return AdapterInvalid(f"can not read {files.folder}: {error.strerror}")
        except Exception as error:
            logger.exception("reading %s failed", files.folder)
            return Internal(f"reading {files.folder} failed: {error}")
        return None

    def _advance(self, read: ImageRead, finished: FinishedBlocks) -> bool:
        """Takes in finished blocks; whether more of the image is in place without gaps."""
        num_before = read.num_finished
        read.num_finished = finished.in_front(read.blocks, num_before)
        if read.num_finished == num_before:
            return False
        read.image.num_ready = int(read.blocks.table.starts[read.num_finished])
        return True

    def _fail(self, read: ImageRead, error: SidestreamError) -> None:
        if read.error is None:
            read.error = error
            read.blocks.halt()

    def _take_if_over(self, read: ImageRead) -> bool:
        """True for exactly one caller: the one who must finish the read."""
        if read not in self._reads or read.num_threads or read.wants_reading:
            return False
        self._reads.remove(read)
        return True

    def _finish(self, read: ImageRead) -> None:
        files = read.adapter.files
        try:
            if read.error is None:
                files.check_unchanged()
                seconds = time.monotonic() - read.began_s
                read.image.read = read.blocks.timing(read.adapter.plan.file_bytes, seconds)
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
        # In this order: who hears that a load of it has ended must have heard of the image before.
        self._ended(read)
        self._progressed()
