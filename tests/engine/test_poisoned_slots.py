"""No step ever reads a byte of another adapter, however slots and chunks change hands."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from ipc.messages import AdapterId
from tests.engine.poisoned_pool import CHUNK_BYTES, POISON, PoisonedPool, SlowCpu, SlowGpu

MakePool = Callable[[int], PoisonedPool]


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def make_pool(request: pytest.FixtureRequest) -> Iterator[MakePool]:
    with ExitStack() as ended:
        yield lambda num_adapters: ended.enter_context(
            PoisonedPool(SlowCpu() if request.param == "cpu" else SlowGpu(), num_adapters).running()
        )


def load(pool: PoisonedPool, adapter_id: AdapterId) -> None:
    pool.want(adapter_id)
    pool.loader.send_all(pool.loads[adapter_id], pool.images[adapter_id])
    pool.hear_placed(adapter_id)


def test_a_slow_step_still_reads_its_adapter_while_another_comes_into_the_slot(
    make_pool: MakePool,
) -> None:
    pool = make_pool(1)
    x, y = pool.register(1), pool.register(2)
    load(pool, x)
    extents = pool.extents(x)
    # The first step loads what a GPU runs, and waits for the device meanwhile.
    assert pool.launch(x).seen() == pool.images[x]
    slow = pool.launch(x)
    pool.want(y)
    assert pool.extents(y) == extents
    assert not slow.is_over, "the step was not slow: nothing is tested"
    pool.loader.send_all(pool.loads[y], pool.images[y])
    pool.hear_placed(y)
    after = pool.launch(y)
    assert slow.seen() == pool.images[x]
    assert after.seen() == pool.images[y]


def test_a_slot_goes_from_hand_to_hand_behind_steps_that_have_not_begun(
    make_pool: MakePool,
) -> None:
    pool = make_pool(1)
    adapters = [pool.register(number) for number in range(1, 5)]
    steps = []
    for adapter_id in adapters:
        load(pool, adapter_id)
        steps += [pool.launch(adapter_id), pool.launch(adapter_id)]
    seen = [step.seen() for step in steps]
    assert seen == [pool.images[adapter_id] for adapter_id in adapters for _ in range(2)]


def test_two_loads_that_take_turns_in_the_ring_do_not_mix(
    make_pool: MakePool, rng: random.Random
) -> None:
    pool = make_pool(3)
    adapters = [pool.register(1), pool.register(2)]
    pool.want(*adapters)
    sent = dict.fromkeys(adapters, 0)
    while left := [each for each in adapters if sent[each] < pool.layout.num_bytes]:
        each = rng.choice(left)
        num_bytes = min(rng.randint(1, CHUNK_BYTES), pool.layout.num_bytes - sent[each])
        pool.loader.send(pool.loads[each], pool.images[each], sent[each], num_bytes)
        sent[each] += num_bytes
    pool.hear_placed(*adapters)
    for each in adapters:
        assert pool.launch(each).seen() == pool.images[each]
    # The third place, and that alone, is as it was: no other byte was touched.
    expected = sum(image.count(POISON) for image in pool.images.values()) + pool.layout.num_bytes
    assert pool.poisoned_bytes() == expected


def test_what_was_placed_of_a_cancelled_load_is_never_read(make_pool: MakePool) -> None:
    pool = make_pool(1)
    w, x, y = (pool.register(number) for number in (1, 2, 3))
    load(pool, w)
    slow = pool.launch(w)
    pool.want(x)
    extents = pool.extents(x)
    half = 2 * CHUNK_BYTES
    for offset in range(0, half, CHUNK_BYTES):
        pool.loader.send(pool.loads[x], pool.images[x], offset)
    pool.remove(x)
    pool.hear_abandoned(x)
    pool.want(y)
    assert pool.extents(y) == extents
    for adapter_id in (w, x, y):
        with pytest.raises(KeyError):
            pool.launch(adapter_id)
    # The loader had sent two more before it heard of the cancellation. One comes before the new
    # load's chunks, one when the bytes in its place are the new adapter's already.
    pool.loader.send(pool.loads[x], pool.images[x], half)
    last = pool.layout.num_bytes - 1
    for offset in range(0, last, CHUNK_BYTES):
        num_bytes = min(CHUNK_BYTES, last - offset)
        pool.loader.send(pool.loads[y], pool.images[y], offset, num_bytes)
    pool.loader.send(pool.loads[x], pool.images[x], half + CHUNK_BYTES)
    pool.loader.send(pool.loads[y], pool.images[y], last)
    pool.hear_placed(y)
    assert pool.launch(y).seen() == pool.images[y]
    assert slow.seen() == pool.images[w]
    pool.loader.wait_until_all_are_free()


def test_a_slot_that_was_given_up_half_way_is_filled_whole_by_the_same_adapter(
    make_pool: MakePool,
) -> None:
    pool = make_pool(1)
    x = pool.register(1)
    pool.want(x)
    first = pool.loads[x]
    pool.loader.send(first, pool.images[x], 0)
    pool.loader.wait_until_all_are_free()
    # As after the loader's death: the load is tried again, under another number.
    pool.residency.loader_lost()
    pool.residency.loader_connected()
    pool.want()
    pool.hear_abandoned(x)
    pool.pool.extent_view(0, pool.pool.num_bytes).fill_(POISON)
    pool.slow.device.synchronize()
    pool.want(x)
    assert pool.loads[x] != first
    pool.loader.send(first, pool.images[x], CHUNK_BYTES)
    pool.loader.send_all(pool.loads[x], pool.images[x])
    pool.hear_placed(x)
    assert pool.launch(x).seen() == pool.images[x]


def send_layers(pool: PoisonedPool, adapter_id: AdapterId, num_layers: int) -> int:
    """Sends chunks until so many layers are complete; returns how far they reach."""
    end = len(pool.image_of_layers(adapter_id, num_layers))
    offset = 0
    while offset < end:
        pool.loader.send(pool.loads[adapter_id], pool.images[adapter_id], offset)
        offset += CHUNK_BYTES
    return offset


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_group_of_layers_reads_them_while_the_others_are_on_their_way(
    num_layers: int, make_pool: MakePool
) -> None:
    pool = make_pool(1)
    x, y = pool.register(1), pool.register(2)
    load(pool, x)
    pool.launch(x).seen()
    slow = pool.launch(x)
    pool.want(y)
    sent = send_layers(pool, y, num_layers)
    assert sent < pool.layout.num_bytes, "all of it was sent: nothing is tested"
    pool.hear_layers(y, num_layers)
    group = pool.launch(y, num_layers)
    pool.loader.send_all(pool.loads[y], pool.images[y], sent)
    pool.hear_placed(y)
    after = pool.launch(y)
    assert slow.seen() == pool.images[x]
    assert group.seen() == pool.image_of_layers(y, num_layers)
    assert after.seen() == pool.images[y]


def test_a_group_of_a_load_that_was_given_up_still_reads_its_own_layers(
    make_pool: MakePool,
) -> None:
    pool = make_pool(1)
    x, y = pool.register(1), pool.register(2)
    pool.want(x)
    extents = pool.extents(x)
    send_layers(pool, x, 2)
    pool.hear_layers(x, 2)
    # The first step loads what a GPU runs, and waits for the device meanwhile.
    assert pool.launch(x, 1).seen() == pool.image_of_layers(x, 1)
    group = pool.launch(x, 2)
    pool.remove(x)
    pool.hear_abandoned(x)
    pool.want(y)
    assert pool.extents(y) == extents
    assert not group.is_over, "the step was not slow: nothing is tested"
    pool.loader.send_all(pool.loads[y], pool.images[y])
    pool.hear_placed(y)
    assert group.seen() == pool.image_of_layers(x, 2)
    assert pool.launch(y).seen() == pool.images[y]
    with pytest.raises(KeyError):
        pool.launch(x, 1)
