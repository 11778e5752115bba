"""The host tier keeps what is in use, evicts what its caller says, and never overlaps images."""

import ctypes
import random

import pytest

from ipc.image import ImageLayout, StageLayout
from ipc.messages import AdapterId, Generation, HostTierChanged
from loader.free_list import FreeList
from loader.host_tier import HostImage, HostTier, ImageState


def generation(counter: int, digest: str = "") -> Generation:
    return Generation(AdapterId(counter), (), digest)


def layout(*stage_bytes: int) -> ImageLayout:
    stages, offset = [], 0
    for num_bytes in stage_bytes:
        stages.append(StageLayout(offset, num_bytes, ()))
        offset += num_bytes
    return ImageLayout(offset, tuple(stages))


def reserved(tier: HostTier, counter: int, *stage_bytes: int) -> HostImage:
    image = tier.reserve(generation(counter), layout(*stage_bytes), [])
    assert image is not None
    return image


def completed(tier: HostTier, image: HostImage) -> HostImage:
    image.num_ready, image.verified = image.num_bytes, True
    tier.complete(image)
    tier.let_go(image)
    return image


def stored(tier: HostTier, counter: int, *stage_bytes: int) -> HostImage:
    return completed(tier, reserved(tier, counter, *stage_bytes))


def write(image: HostImage, stage: int, payload: bytes) -> None:
    """Writes a stage's first bytes, as compiled code does."""
    ctypes.memmove(int(image.stage_addresses[stage]), payload, len(payload))


def test_image_is_found_only_once_it_is_whole() -> None:
    tier = HostTier(1024)
    image = reserved(tier, 1, 512)
    assert tier.find(generation(1)) is None
    completed(tier, image)
    assert tier.find(generation(1)) is image


def test_image_is_found_by_its_full_generation() -> None:
    tier = HostTier(1024)
    stored(tier, 1, 512)
    assert tier.find(generation(1, digest="another")) is None


def test_whole_image_of_the_same_adapter_takes_the_place_of_the_older() -> None:
    tier = HostTier(1024)
    stored(tier, 1, 512)
    newer = tier.reserve(generation(1, "newer"), layout(512), [])
    assert newer is not None
    completed(tier, newer)
    assert tier.idle() == [generation(1, "newer")] and tier.used_bytes == 512


def test_idle_images_are_listed_from_the_least_recently_used() -> None:
    tier = HostTier(1024)
    for counter in (1, 2, 3):
        stored(tier, counter, 128)
    tier.find(generation(1))
    assert tier.idle() == [generation(2), generation(3), generation(1)]


def test_victims_are_evicted_in_their_order_and_no_more_than_needed() -> None:
    tier = HostTier(384)
    for counter in (1, 2, 3):
        stored(tier, counter, 128)
    assert tier.reserve(generation(4), layout(128), [generation(2), generation(1)])
    assert tier.idle() == [generation(1), generation(3)]


def test_nothing_is_evicted_when_all_victims_are_not_enough() -> None:
    tier = HostTier(384)
    for counter in (1, 2, 3):
        stored(tier, counter, 128)
    assert tier.reserve(generation(4), layout(384), [generation(1), generation(2)]) is None
    assert len(tier.idle()) == 3


def test_image_fits_into_pieces_that_hold_a_stage_each() -> None:
    tier = HostTier(512)
    for counter in (1, 2, 3, 4):
        stored(tier, counter, 128)
    image = tier.reserve(generation(5), layout(128, 0, 128), [generation(1), generation(3)])
    assert image is not None and image.extents == {0: 0, 2: 256}
    assert tier.idle() == [generation(2), generation(4)]


def test_image_in_use_is_not_idle() -> None:
    tier = HostTier(1024)
    image = stored(tier, 1, 128)
    tier.use(image)
    assert tier.idle() == []
    tier.let_go(image)
    assert tier.idle() == [generation(1)]


def test_forgotten_image_keeps_its_bytes_while_it_is_in_use() -> None:
    tier = HostTier(128)
    image = stored(tier, 1, 128)
    tier.use(image)
    tier.forget(AdapterId(1))
    assert tier.find(generation(1)) is None
    assert tier.reserve(generation(2), layout(128), []) is None
    tier.let_go(image)
    assert tier.reserve(generation(2), layout(128), []) is not None


def test_discarded_image_leaves_its_room() -> None:
    tier = HostTier(128)
    image = reserved(tier, 1, 128)
    tier.discard(image)
    tier.let_go(image)
    assert tier.used_bytes == 0 and tier.find(generation(1)) is None


def test_changes_are_told_once() -> None:
    tier = HostTier(384)
    stored(tier, 1, 128)
    stored(tier, 2, 128)
    assert tier.take_changes() == HostTierChanged([AdapterId(1), AdapterId(2)], [], 256)
    assert tier.take_changes() is None
    tier.forget(AdapterId(1))
    stored(tier, 3, 128)
    assert tier.take_changes() == HostTierChanged([AdapterId(3)], [AdapterId(1)], 256)


def test_what_came_and_left_in_between_is_not_told() -> None:
    tier = HostTier(384)
    stored(tier, 1, 128)
    tier.forget(AdapterId(1))
    assert tier.take_changes() is None


def test_description_holds_all_and_settles_changes() -> None:
    tier = HostTier(384)
    stored(tier, 2, 128)
    stored(tier, 1, 128)
    assert tier.describe() == HostTierChanged([AdapterId(1), AdapterId(2)], [], 256)
    assert tier.take_changes() is None


def test_views_cover_any_range_in_order() -> None:
    tier = HostTier(1024)
    image = reserved(tier, 1, 256, 0, 128)
    write(image, 0, b"a" * 256)
    write(image, 2, b"b" * 128)
    whole = b"a" * 256 + b"b" * 128
    for start, stop in ((0, 384), (10, 20), (200, 300), (256, 384), (5, 5)):
        assert b"".join(image.views(start, stop)) == whole[start:stop]


def test_extents_that_touch_are_one_piece() -> None:
    tier = HostTier(1024)
    image = reserved(tier, 1, 128, 0, 256, 128)
    assert [view.nbytes for view in image.views(0, 512)] == [512]
    assert [view.nbytes for view in image.views(100, 400)] == [300]


def test_no_piece_reaches_from_one_segment_into_the_next() -> None:
    tier = HostTier(1024, segment_bytes=384)
    reserved(tier, 1, 128)
    image = reserved(tier, 2, 128, 512, 128)
    write(image, 1, bytes(range(256)) * 2)
    assert [view.nbytes for view in image.views(0, 768)] == [256, 384, 128]
    assert b"".join(image.views(128, 640)) == bytes(range(256)) * 2


def test_closed_tier_hands_out_what_was_opened() -> None:
    tier = HostTier(512, segment_bytes=256, closed=True)
    assert [segment.nbytes for segment in tier.segments()] == [256, 256]
    assert tier.reserve(generation(1), layout(128), []) is None
    tier.open(256)
    assert not tier.is_open and tier.used_bytes == 0
    reserved(tier, 1, 128)
    assert tier.reserve(generation(2), layout(128, 128), []) is None
    tier.open(512)
    tier.open(256)
    assert tier.is_open and tier.used_bytes == 128
    assert reserved(tier, 2, 384).extents == {0: 128}, "an extent may lie in two segments"


def test_last_byte_may_be_sent_only_when_verified() -> None:
    image = reserved(HostTier(1024), 1, 256)
    image.num_ready = 256
    assert image.has(0, 255) and not image.has(0, 256)
    image.verified = True
    assert image.has(0, 256)


def test_freed_ranges_merge_whatever_their_order() -> None:
    for seed in range(50):
        generator = random.Random(seed)
        free = FreeList(1000)
        taken = [(free.allocate(size), size) for size in (100, 250, 50, 300, 300)]
        assert free.allocate(1) is None
        generator.shuffle(taken)
        for start, size in taken:
            assert start is not None
            free.free(start, size)
        assert free.allocate(1000) == 0, f"seed {seed}"


@pytest.mark.parametrize("seed", range(8))
def test_random_use_keeps_every_invariant(seed: int) -> None:
    generator = random.Random(seed)
    tier = HostTier(8192)
    filling: list[HostImage] = []
    in_use: list[HostImage] = []
    known: set[AdapterId] = set()
    for counter in range(600):
        match generator.randrange(6):
            case 0 | 1:
                sizes = [128 * generator.randrange(5) for _ in range(4)] + [128]
                image = tier.reserve(generation(counter), layout(*sizes), tier.idle())
                if image is not None:
                    image.views(0, image.num_bytes)
                    for view in image.views(0, image.num_bytes):
                        view[:] = bytes([counter % 256]) * view.nbytes
                    filling.append(image)
            case 2 if filling:
                completed(tier, filling.pop(generator.randrange(len(filling))))
            case 3 if filling:
                image = filling.pop(generator.randrange(len(filling)))
                tier.discard(image)
                tier.let_go(image)
            case 4 if tier.idle():
                found = tier.find(generator.choice(tier.idle()))
                assert found is not None
                tier.use(found)
                in_use.append(found)
            case 5 if in_use:
                image = in_use.pop(generator.randrange(len(in_use)))
                if generator.random() < 0.3:
                    tier.forget(image.generation.counter)
                tier.let_go(image)
        idle = [image for g in tier.idle() if (image := tier.find(g)) is not None]
        for image in {id(i): i for i in (*filling, *in_use, *idle)}.values():
            fill = image.generation.counter % 256
            assert all(set(view) == {fill} for view in image.views(0, image.num_bytes)), seed
        present = {id(i): i.num_bytes for i in (*filling, *in_use, *idle)}
        assert tier.used_bytes == sum(present.values()), seed
        if (changes := tier.take_changes()) is not None:
            assert not known & set(changes.added) and known >= set(changes.removed), seed
            known = (known | set(changes.added)) - set(changes.removed)
        whole = {i.generation.counter for i in (*in_use, *idle) if i.state is ImageState.WHOLE}
        assert known == whole, seed
