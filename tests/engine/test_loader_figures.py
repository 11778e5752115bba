"""What loaders tell is summed up, whichever of them it was."""

from engine.loader_figures import LoaderFigures
from ipc.errors import AdapterInvalid
from ipc.messages import (
    Epoch,
    HostTierChanged,
    LoaderHello,
    LoadFailed,
    LoadId,
    LoadSent,
    LoadTiming,
    ReadTiming,
)


def sent(number: int, queue_s: float, copy_s: float, *, from_host_tier: bool) -> LoadSent:
    return LoadSent(LoadId(number), LoadTiming(queue_s, copy_s, 1000, from_host_tier))


def test_loads_that_were_sent_count_by_where_their_bytes_came_from() -> None:
    figures = LoaderFigures()
    figures.load_ended(sent(1, 0.25, 1.0, from_host_tier=True))
    figures.load_ended(sent(2, 0.5, 2.0, from_host_tier=False))
    figures.load_ended(sent(3, 0.25, 4.0, from_host_tier=False))
    figures.load_ended(LoadFailed(LoadId(4), AdapterInvalid("truncated").info))
    stats = figures.stats()
    assert (stats.bytes_copied_from_host, stats.bytes_copied_from_disk) == (1000, 2000)
    assert (sum(stats.queue_seconds.counts), stats.queue_seconds.sum) == (3, 1.0)
    assert (sum(stats.copy_seconds.counts), stats.copy_seconds.sum) == (3, 7.0)


def test_reads_and_evictions_add_up_over_the_messages() -> None:
    figures = LoaderFigures()
    reads = [ReadTiming(100, 0.5, 0.25), ReadTiming(50, 0.25, 0.0)]
    figures.host_tier_changed(HostTierChanged([], [], 640, reads, num_evictions=2))
    figures.host_tier_changed(HostTierChanged([], [], 320, reads[:1], num_evictions=1))
    stats = figures.stats()
    assert (stats.file_bytes_read, stats.num_host_evictions) == (250, 3)
    assert (stats.host_tier_bytes_used, sum(stats.read_seconds.counts)) == (320, 3)
    assert (stats.read_seconds.sum, stats.dequantize_seconds.sum) == (1.25, 0.5)


def test_a_lost_loaders_memory_is_gone_and_what_it_did_stays_counted() -> None:
    figures = LoaderFigures()
    figures.connected(Epoch(1), LoaderHello(4096))
    figures.host_tier_changed(HostTierChanged([], [], 640, [ReadTiming(100, 0.5, 0.5)]))
    figures.lost()
    stats = figures.stats()
    assert (stats.host_tier_bytes, stats.host_tier_bytes_used) == (0, 0)
    figures.connected(Epoch(3), LoaderHello(8192))
    stats = figures.stats()
    assert (stats.epoch, stats.num_connections, stats.host_tier_bytes) == (3, 2, 8192)
    assert stats.file_bytes_read == 100
