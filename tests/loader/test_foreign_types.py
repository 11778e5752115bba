"""Types that only the package gguf reads become images piece by piece, in bounded memory."""

import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf.quants
import pytest
from gguf import GGMLQuantizationType as Type

from ipc.messages import AdapterSource
from loader.blocks import Block, cut
from loader.ggml_types import GgmlType, ggml_type
from loader.host_tier import HostImage, HostTier
from loader.inspector import OpenAdapter
from loader.native.runs import FOREIGN_STEP_VALUES
from loader.shared_blocks import BlockReader, SharedBlocks
from tests.loader.gguf_files import MADE_UP, Written
from tests.loader.images import HOST_TIER_BYTES, read_image
from tests.loader.test_gguf import base_of, inspect

FOREIGN = [kind for kind in (*MADE_UP, Type.MXFP4) if ggml_type(int(kind)).format is None]
# What a read takes for a value of a step, in bytes.
PER_VALUE = 24
NUM_THREADS = 4


class Reading:
    """A foreign adapter of half a million values, open, and room for its image."""

    def __init__(self, path: Path, kind: Type) -> None:
        path.mkdir()
        base = base_of()
        Written(path / "adapter.gguf", base, lambda: kind)
        inspector, manifest = inspect(base, path / "adapter.gguf")
        self.expected = read_image(inspector, manifest)
        self.adapter: OpenAdapter = inspector.open(
            AdapterSource(manifest.path, manifest.generation)
        )
        image = HostTier(HOST_TIER_BYTES).reserve(manifest.generation, self.adapter.plan.layout, [])
        assert image is not None
        self.image: HostImage = image
        for view in image.views(0, image.num_bytes):
            view[:] = b"\xaa" * view.nbytes

    def read(
        self, blocks: SharedBlocks, before_block: Callable[[Block], None] | None = None
    ) -> None:
        BlockReader(before_block).read(blocks, self.image, self.adapter.files, self.adapter.plan)

    @property
    def contents(self) -> bytes:
        return b"".join(self.image.views(0, self.image.num_bytes))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Type], Reading]]:
    readings: list[Reading] = []

    def open_one(kind: Type) -> Reading:
        readings.append(Reading(tmp_path / kind.name, kind))
        return readings[-1]

    yield open_one
    for reading in readings:
        reading.adapter.files.close()


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.name)
def test_a_thread_takes_memory_for_a_step_at_a_time(
    opened: Callable[[Type], Reading], kind: Type
) -> None:
    reading, reader = opened(kind), BlockReader()
    blocks = SharedBlocks(cut(reading.adapter.plan, 32 << 20))
    tracemalloc.start()
    try:
        reader.read(blocks, reading.image, reading.adapter.files, reading.adapter.plan)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reading.contents == reading.expected
    assert peak_bytes < PER_VALUE * FOREIGN_STEP_VALUES < len(reading.expected)


def test_a_read_that_is_halted_ends_after_the_piece_and_goes_on_later(
    opened: Callable[[Type], Reading],
) -> None:
    reading = opened(Type.IQ3_S)
    blocks = SharedBlocks(cut(reading.adapter.plan, 32 << 20))
    reading.read(blocks, lambda block: blocks.halt())
    assert blocks.num_begun == 1 < blocks.table.num_blocks
    assert blocks.table.starts[1] <= 1 << 20
    blocks.go_on()
    reading.read(blocks)
    assert reading.contents == reading.expected


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.name)
def test_threads_dequantize_at_once(
    opened: Callable[[Type], Reading], kind: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = opened(kind)
    # The table that a type has in its class is made again, by all of them.
    monkeypatch.setattr(getattr(gguf.quants, kind.name), "grid", None)
    blocks = SharedBlocks(cut(reading.adapter.plan, 10_000))
    together = threading.Barrier(NUM_THREADS)

    def begin(block: Block) -> None:
        if blocks.num_begun <= NUM_THREADS:
            together.wait(timeout=20)

    threads = [
        threading.Thread(target=reading.read, args=(blocks, begin)) for _ in range(NUM_THREADS)
    ]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        sys.setswitchinterval(interval_s)
    assert reading.contents == reading.expected


def test_what_the_package_raises_fails_the_read(
    opened: Callable[[Type], Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = opened(Type.Q2_K)

    def fail(self: GgmlType, source: int, target: int, num_values: int) -> None:
        raise MemoryError(f"no room for {num_values} values")

    monkeypatch.setattr(GgmlType, "dequantize", fail)
    with pytest.raises(MemoryError, match="no room for 65536 values"):
        reading.read(SharedBlocks(cut(reading.adapter.plan, 32 << 20)))
