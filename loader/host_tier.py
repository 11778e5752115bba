"""The host tier: images in one arena of host memory with a byte budget.

| state   | bytes                      | evictable           | left by                          |
|---------|----------------------------|---------------------|----------------------------------|
| FILLING | come in, front to back     | no                  | ``complete``, ``discard``        |
| WHOLE   | one verified generation's  | while nobody has it | eviction, ``forget``: gone       |
| GONE    | anybody's soon             |                     |                                  |

An image that is forgotten while it is in use is no longer found, and leaves once it is let go.

An image takes one extent per stage, as it does in the GPU's pool: in steady state free ranges
are as large as the small adapters that have left, and one range for a whole large adapter would
cost far more evictions than its bytes do.

Where memory has to be pinned before a GPU can copy from it at full speed, the arena is opened
segment by segment, as they become pinned, and no piece that an image is copied in reaches from one
segment into the next.
"""

import contextlib
import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ipc.image import ImageLayout
from ipc.messages import AdapterId, Generation, HostTierChanged, ReadTiming
from loader.free_list import FreeList

SEGMENT_BYTES = 1 << 30


class ImageState(Enum):
    FILLING = "filling"
    WHOLE = "whole"
    GONE = "gone"


class HostImage:
    """One adapter's image in the arena.

    While it is FILLING, the reader's threads set ``num_ready``, ``read`` and ``verified``, in this
    order, and other threads look at them: ``num_ready`` bytes are in place, to have all of them
    took what ``read`` says, and they are of one generation if ``verified``. Everything else belongs
    to the host tier's thread.

    ``stage_addresses`` tells where each stage begins in memory, ``[num_stages]``, 0 for one without
    bytes: for code that writes there without the GIL while it holds the image in use.
    """

    def __init__(
        self,
        generation: Generation,
        layout: ImageLayout,
        extents: dict[int, int],
        arena: memoryview,
        segment_bytes: int,
    ) -> None:
        self.generation = generation
        self.layout = layout
        self.extents = extents
        self.num_ready = 0
        self.read: ReadTiming | None = None
        self.verified = False
        self.state = ImageState.FILLING
        self.num_users = 0
        self._arena = arena
        self._pieces = _pieces(layout, extents, segment_bytes)
        self._piece_starts = [piece.start for piece in self._pieces]
        self.stage_addresses = _addresses(layout, extents, arena)

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    def has(self, start: int, stop: int) -> bool:
        """Whether ``[start, stop)`` may be sent; the image's last byte only when verified."""
        return stop <= self.num_ready and (stop < self.num_bytes or self.verified)

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes ``[start, stop)`` of the image, in order, in as few pieces as they lie."""
        index = max(0, bisect_right(self._piece_starts, start) - 1)
        while start < stop:
            first, last, position = self._pieces[index]
            until = min(stop, last)
            yield self._arena[position + start - first : position + until - first]
            start, index = until, index + 1


def _addresses(
    layout: ImageLayout, extents: dict[int, int], arena: memoryview
) -> NDArray[np.int64]:
    addresses = np.zeros(len(layout.stages), np.int64)
    begin = np.frombuffer(arena, np.uint8).ctypes.data
    for stage, position in extents.items():
        addresses[stage] = begin + position
    return addresses


class _Piece(NamedTuple):
    """Image bytes ``[start, stop)`` lie in one run of the arena, from ``position`` on."""

    start: int
    stop: int
    position: int


def _pieces(layout: ImageLayout, extents: dict[int, int], segment_bytes: int) -> list[_Piece]:
    """An image's pieces in order: extents that touch are joined, at segments' ends they part."""
    pieces: list[_Piece] = []
    for stage, position in extents.items():
        start = layout.stages[stage].offset
        stop = start + layout.stages[stage].num_bytes
        while start < stop:
            until = min(stop, start + segment_bytes - position % segment_bytes)
            before = pieces[-1] if pieces else _Piece(0, 0, 0)
            touches = position == before.position + before.stop - before.start
            if touches and position % segment_bytes and start == before.stop:
                pieces[-1] = before._replace(stop=until)
            else:
                pieces.append(_Piece(start, until, position))
            position += until - start
            start = until
    return pieces


class HostTier:
    """Owns the arena and knows every image in it. Belongs to one thread.

    Of one that is made ``closed`` nothing is handed out before it is opened.
    """

    def __init__(
        self, num_bytes: int, segment_bytes: int = SEGMENT_BYTES, *, closed: bool = False
    ) -> None:
        self.num_bytes = num_bytes
        self.segment_bytes = segment_bytes
        self._open_bytes = 0
        arena = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # A kernel without huge pages serves as well, slower.
            arena.madvise(mmap.MADV_HUGEPAGE)
        self._arena = memoryview(arena)
        self._free = FreeList(0)
        # Whole images, least recently used first.
        self._images: OrderedDict[Generation, HostImage] = OrderedDict()
        self._added: set[AdapterId] = set()
        self._removed: set[AdapterId] = set()
        self._reads: list[ReadTiming] = []
        self._num_evictions = 0
        if not closed:
            self.open(num_bytes)

    @property
    def used_bytes(self) -> int:
        return self._open_bytes - self._free.num_free

    @property
    def is_open(self) -> bool:
        """Whether all of the arena may be handed out."""
        return self._open_bytes == self.num_bytes

    def segments(self) -> list[memoryview]:
        """The arena's memory, in the order in which it is to be opened."""
        starts = range(0, self.num_bytes, self.segment_bytes)
        return [self._arena[start : start + self.segment_bytes] for start in starts]

    def open(self, num_bytes: int) -> None:
        """The arena's first ``num_bytes`` bytes may be handed out, if they could not before."""
        assert num_bytes <= self.num_bytes
        if num_bytes > self._open_bytes:
            self._free.free(self._open_bytes, num_bytes - self._open_bytes)
            self._open_bytes = num_bytes

    def find(self, generation: Generation) -> HostImage | None:
        """The whole image of this very generation, now the most recently used."""
        image = self._images.get(generation)
        if image is not None:
            self._images.move_to_end(generation)
        return image

    def __contains__(self, generation: Generation) -> bool:
        return generation in self._images

    def idle(self) -> list[Generation]:
        """Whole images that nobody has in use, least recently used first."""
        return [g for g, image in self._images.items() if image.num_users == 0]

    def reserve(
        self, generation: Generation, layout: ImageLayout, victims: Iterable[Generation]
    ) -> HostImage | None:
        """Room for an image, now FILLING and in use once by the caller.

        As many ``victims`` (idle images) are evicted, in their order, as that takes. None, and
        nothing evicted, if the free bytes and all victims' together would not be enough; None
        also if they are, but in pieces too small for a stage.
        """
        victims = list(victims)
        evictable = sum(self._images[victim].num_bytes for victim in victims)
        if layout.num_bytes > self._free.num_free + evictable:
            return None
        remaining = iter(victims)
        while True:
            if self._free.num_free >= layout.num_bytes:
                extents = self._allocate(layout)
                if extents is not None:
                    image = HostImage(generation, layout, extents, self._arena, self.segment_bytes)
                    image.num_users = 1
                    return image
            victim = next(remaining, None)
            if victim is None:
                return None
            self._num_evictions += 1
            self._remove(victim)

    def complete(self, image: HostImage) -> None:
        """The image is whole and verified: it is found from now on. Still in use by the caller."""
        assert image.state is ImageState.FILLING and image.verified
        assert image.num_ready == image.num_bytes
        for generation in self._of(image.generation.counter):
            self._remove(generation)
        image.state = ImageState.WHOLE
        self._images[image.generation] = image
        if image.read is not None:
            self._reads.append(image.read)
        self._note(image.generation.counter, self._added, self._removed)

    def discard(self, image: HostImage) -> None:
        """The image, FILLING, will never be whole; its room is free once it is let go."""
        assert image.state is ImageState.FILLING
        image.state = ImageState.GONE

    def use(self, image: HostImage) -> None:
        """The image stays where it is until a matching ``let_go``."""
        assert image.state is not ImageState.GONE
        image.num_users += 1

    def let_go(self, image: HostImage) -> None:
        """Ends one ``use``."""
        assert image.num_users > 0
        image.num_users -= 1
        if image.num_users == 0 and image.state is ImageState.GONE:
            self._free_extents(image)

    def forget(self, adapter_id: AdapterId) -> None:
        """The adapter's image is not found any more."""
        for generation in self._of(adapter_id):
            self._remove(generation)

    def clear(self) -> None:
        """No image is found any more."""
        for generation in list(self._images):
            self._remove(generation)

    def take_changes(self) -> HostTierChanged | None:
        """What came and left since the last call; None if nothing did."""
        if not self._added and not self._removed:
            return None
        added, removed = sorted(self._added), sorted(self._removed)
        changes = HostTierChanged(added, removed, self.used_bytes, self._reads, self._num_evictions)
        self._settle()
        return changes

    def describe(self) -> HostTierChanged:
        """All that is there, for one who knows nothing yet; earlier changes are settled by it."""
        self._settle()
        ids = sorted(generation.counter for generation in self._images)
        return HostTierChanged(ids, [], self.used_bytes)

    def _settle(self) -> None:
        self._added.clear()
        self._removed.clear()
        self._reads = []
        self._num_evictions = 0

    def _of(self, adapter_id: AdapterId) -> list[Generation]:
        return [generation for generation in self._images if generation.counter == adapter_id]

    def _remove(self, generation: Generation) -> None:
        image = self._images.pop(generation)
        image.state = ImageState.GONE
        self._note(generation.counter, self._removed, self._added)
        if image.num_users == 0:
            self._free_extents(image)

    def _note(self, adapter_id: AdapterId, change: set[AdapterId], reverse: set[AdapterId]) -> None:
        # One who was told of neither needs to be told of neither; told of both, of the last.
        if adapter_id in reverse:
            reverse.discard(adapter_id)
        else:
            change.add(adapter_id)

    def _allocate(self, layout: ImageLayout) -> dict[int, int] | None:
        extents: dict[int, int] = {}
        for index, stage in enumerate(layout.stages):
            if not stage.num_bytes:
                continue
            start = self._free.allocate(stage.num_bytes)
            if start is None:
                for taken, extent in extents.items():
                    self._free.free(extent, layout.stages[taken].num_bytes)
                return None
            extents[index] = start
        return extents

    def _free_extents(self, image: HostImage) -> None:
        for index, extent in image.extents.items():
            self._free.free(extent, image.layout.stages[index].num_bytes)
