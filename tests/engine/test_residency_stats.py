"""Every load and every request is counted once, whatever becomes of it."""

from engine.residency import MAX_LOST_LOADERS
from ipc.errors import AdapterInvalid
from ipc.messages import LoadId
from ipc.stats import AdapterHits
from tests.engine.test_residency import IMAGE_BYTES, A, B, C, Pool


def ends(pool: Pool) -> tuple[int, int, int, int]:
    """Loads that were placed, failed, were cancelled, and lost their loader."""
    loads = pool.residency.stats.counts()
    num_placed = sum(loads.load_seconds.counts)
    assert sum(loads.place_seconds.counts) == num_placed
    return num_placed, loads.num_failed, loads.num_cancelled, loads.num_lost


def test_a_placed_load_counts_with_its_seconds_and_bytes() -> None:
    pool = Pool(2)
    pool.meet(A, now_s=10.0)
    pool.residency.load_placed(LoadId(1), 10.5, place_s=0.125)
    loads = pool.residency.stats.counts()
    assert (loads.load_seconds.sum, loads.place_seconds.sum) == (0.5, 0.125)
    assert loads.loaded_bytes == IMAGE_BYTES
    assert ends(pool) == (1, 0, 0, 0)


def test_a_failed_load_counts_once_and_so_does_one_out_of_time() -> None:
    pool = Pool(2)
    pool.meet(A, B)
    pool.residency.load_failed(LoadId(1), AdapterInvalid("truncated"))
    pool.residency.load_failed(LoadId(1), AdapterInvalid("truncated"))
    pool.residency.load_placed(LoadId(1), 1.0)
    pool.residency.load_abandoned(LoadId(1))
    assert ends(pool) == (0, 1, 0, 0)
    pool.meet(now_s=61.0)
    assert ends(pool) == (0, 2, 0, 0)


def test_a_load_of_an_adapter_that_is_removed_counts_as_cancelled() -> None:
    pool = Pool(1)
    pool.meet(A)
    pool.residency.remove(A)
    pool.residency.load_abandoned(LoadId(1))
    assert ends(pool) == (0, 0, 1, 0)


def test_a_load_counts_as_lost_with_each_loader_and_fails_with_the_last() -> None:
    pool = Pool(1)
    for number in range(1, MAX_LOST_LOADERS + 1):
        pool.meet(A)
        pool.residency.loader_lost()
        pool.residency.load_abandoned(LoadId(number))
        pool.residency.loader_connected()
    assert ends(pool) == (0, 1, 0, MAX_LOST_LOADERS - 1)


def test_requests_are_counted_by_where_they_find_their_adapter() -> None:
    pool = Pool(2)
    hits = pool.residency.hits
    hits.host_tier_changed(added=(A, B), removed=())
    pool.residency.add_request(A)
    pool.residency.add_request(C)
    assert hits.counts() == AdapterHits(gpu=0, loading=0, host=1, disk=1)
    pool.meet(A)
    pool.residency.add_request(A)
    pool.residency.load_placed(LoadId(1), 1.0)
    pool.residency.add_request(A)
    assert hits.counts() == AdapterHits(gpu=1, loading=1, host=1, disk=1)


def test_what_left_the_loaders_memory_or_was_lost_with_it_is_found_on_disk() -> None:
    pool = Pool(2)
    hits = pool.residency.hits
    hits.host_tier_changed(added=(A, B, C), removed=())
    hits.host_tier_changed(added=(), removed=(A,))
    pool.residency.add_request(A)
    pool.residency.add_request(B)
    pool.residency.loader_lost()
    pool.residency.add_request(C)
    assert hits.counts() == AdapterHits(host=1, disk=2)
