"""What the loaders tell of their work, summed up over all of them."""

from engine.histogram import LOAD_SECONDS, Histogram
from ipc.messages import Epoch, HostTierChanged, LoaderHello, LoadFailed, LoadSent
from ipc.stats import LoaderStats


class LoaderFigures:
    """Belongs to the link, on the I/O thread. What a loader has not told when it dies is lost."""

    def __init__(self) -> None:
        self._epoch = 0
        self._num_connections = 0
        self._host_tier_bytes = 0
        self._host_tier_bytes_used = 0
        self._num_host_evictions = 0
        self._file_bytes_read = 0
        self._bytes_copied_from_host = 0
        self._bytes_copied_from_disk = 0
        self._queue_seconds = Histogram(LOAD_SECONDS)
        self._read_seconds = Histogram(LOAD_SECONDS)
        self._dequantize_seconds = Histogram(LOAD_SECONDS)
        self._copy_seconds = Histogram(LOAD_SECONDS)

    def connected(self, epoch: Epoch, hello: LoaderHello) -> None:
        """A loader says hello; what it has in its host tier it tells next."""
        self._epoch = epoch
        self._num_connections += 1
        self._host_tier_bytes = hello.host_tier_bytes

    def lost(self) -> None:
        """Its host tier is gone, or will be described anew."""
        self._host_tier_bytes = self._host_tier_bytes_used = 0

    def load_ended(self, message: LoadSent | LoadFailed) -> None:
        """Counts a load whose last byte is in the ring."""
        if isinstance(message, LoadFailed):
            return
        timing = message.timing
        self._queue_seconds.observe(timing.queue_s)
        self._copy_seconds.observe(timing.copy_s)
        if timing.from_host_tier:
            self._bytes_copied_from_host += timing.num_bytes
        else:
            self._bytes_copied_from_disk += timing.num_bytes

    def host_tier_changed(self, change: HostTierChanged) -> None:
        """Images came or left."""
        self._host_tier_bytes_used = change.used_bytes
        self._num_host_evictions += change.num_evictions
        for read in change.reads:
            self._file_bytes_read += read.file_bytes
            self._read_seconds.observe(read.read_s)
            self._dequantize_seconds.observe(read.dequantize_s)

    def stats(self) -> LoaderStats:
        """All so far."""
        return LoaderStats(
            epoch=self._epoch,
            num_connections=self._num_connections,
            host_tier_bytes=self._host_tier_bytes,
            host_tier_bytes_used=self._host_tier_bytes_used,
            num_host_evictions=self._num_host_evictions,
            file_bytes_read=self._file_bytes_read,
            bytes_copied_from_host=self._bytes_copied_from_host,
            bytes_copied_from_disk=self._bytes_copied_from_disk,
            queue_seconds=self._queue_seconds.counts(),
            read_seconds=self._read_seconds.counts(),
            dequantize_seconds=self._dequantize_seconds.counts(),
            copy_seconds=self._copy_seconds.counts(),
        )
