"""Reading gives the exact image of one generation, or fails and leaves nothing behind."""

import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from ipc.base_model import BaseModel, DType
from ipc.messages import AdapterId, AdapterSource
from loader.adapter_files import AdapterFolders
from loader.blocks import Block, cut, spread
from loader.host_tier import HostImage, HostTier
from loader.inspector import Inspector, OpenAdapter
from loader.reader import ImageRead, Reader
from tests.adapters import (
    ALL_MODULES,
    StoredTensor,
    base_model,
    config_fields,
    image_bytes,
    make_old,
    random_tensors,
    tensor_name,
    write_adapter,
    write_folder,
)

TENSORS = "adapter_model.safetensors"
DEADLINE_S = 20.0


def opened(folder: Path, base: BaseModel) -> tuple[AdapterSource, OpenAdapter]:
    inspector = Inspector(AdapterFolders([str(folder.parent)], None), base, 64, 1 << 20)
    manifest = inspector.inspect(AdapterId(1), str(folder))
    source = AdapterSource(manifest.path, manifest.generation)
    return source, inspector.open(source)


class Reading:
    """A reader whose reads end up in a queue, and room for one image full of old bytes."""

    def __init__(
        self,
        block_bytes: int,
        num_threads: int = 1,
        before_block: Callable[[Block], None] | None = None,
    ) -> None:
        self.ended: queue.Queue[ImageRead] = queue.Queue()
        self.tier = HostTier(1 << 20)
        self.reader = Reader(num_threads, block_bytes, lambda: None, self.ended.put, before_block)

    def room(self, source: AdapterSource, adapter: OpenAdapter) -> HostImage:
        image = self.tier.reserve(source.generation, adapter.plan.layout, [])
        assert image is not None
        for view in image.views(0, image.num_bytes):
            view[:] = b"\xaa" * view.nbytes
        return image

    def read(self, folder: Path, base: BaseModel) -> ImageRead:
        source, adapter = opened(folder, base)
        read = self.reader.begin(self.room(source, adapter), adapter)
        self.reader.start()
        assert self.ended.get(timeout=DEADLINE_S) is read
        self.reader.stop(DEADLINE_S)
        return read


def contents(image: HostImage) -> bytes:
    return b"".join(image.views(0, image.num_bytes))


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize(("rank", "block_bytes"), [(8, 1), (8, 1 << 20), (3, 5000), (16, 3000)])
def test_image_is_what_the_long_way_gives(
    tmp_path: Path, stored: str, dtype: DType, rank: int, block_bytes: int
) -> None:
    base = base_model(dtype=dtype)
    tensors = write_adapter(tmp_path / "a", base, rank=rank, modules=ALL_MODULES, dtype=stored)
    read = Reading(block_bytes, num_threads=3).read(tmp_path / "a", base)
    assert read.error is None and read.image.verified
    assert contents(read.image) == image_bytes(base, tensors)


def test_ranks_dtypes_and_layers_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    base = base_model(num_layers=3, dtype=DType.BFLOAT16)
    tensors: dict[str, StoredTensor] = {}
    ranks = {"q_proj": 8, "v_proj": 1, "up_proj": 64}
    for index, dtype in enumerate(("F32", "BF16")):
        layers = [2 * index]
        tensors |= random_tensors(base, ranks=ranks, modules=ranks, layers=layers, dtype=dtype)
    config = config_fields(
        8, target_modules=list(ranks), rank_pattern=ranks, layers_to_transform=[0, 2]
    )
    write_folder(tmp_path / "a", tensors, config)
    read = Reading(700).read(tmp_path / "a", base)
    assert contents(read.image) == image_bytes(base, tensors)


@pytest.mark.parametrize(
    ("image_mib", "expected_mib"), [(0.5, 2), (32, 2), (128, 4), (512, 8), (1280, 8)]
)
def test_small_images_have_small_blocks_so_that_every_thread_gets_some(
    image_mib: float, expected_mib: int
) -> None:
    mib = 1 << 20
    assert spread(int(image_mib * mib), num_threads=16, block_bytes=8 * mib) == expected_mib * mib


def test_blocks_are_never_larger_than_asked_for() -> None:
    assert spread(1 << 30, num_threads=1, block_bytes=4096) == 4096


def test_threads_that_read_step_back_for_others(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base, rank=8)
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    theirs: list[int] = []

    def before_block(_: Block) -> None:
        theirs.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    Reading(1 << 20, before_block=before_block).read(tmp_path / "a", base)
    assert theirs and all(each > mine for each in theirs)
    assert os.getpriority(os.PRIO_PROCESS, 0) == mine


def test_blocks_cover_the_image_without_gaps(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base, rank=3, modules=ALL_MODULES)
    _, adapter = opened(tmp_path / "a", base)
    adapter.files.close()
    for block_bytes in (1, 999, 10_000, 1 << 20):
        table = cut(adapter.plan, block_bytes)
        blocks = [table[index] for index in range(table.num_blocks)]
        assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
        assert blocks[-1].stop == adapter.plan.layout.num_bytes
    assert cut(adapter.plan, 1 << 20).num_blocks == 1


def test_finished_bytes_are_counted_from_the_front(tmp_path: Path) -> None:
    base = base_model()
    tensors = write_adapter(tmp_path / "a", base, modules=ALL_MODULES)
    expected = image_bytes(base, tensors)
    first_may_go = threading.Event()
    seen: list[int] = []

    def before_block(block: Block) -> None:
        # The first block is held back until a later one is being read by the other thread.
        if block.start == 0:
            assert first_may_go.wait(DEADLINE_S)
        else:
            seen.append(read.image.num_ready)
            if len(seen) == 4:
                first_may_go.set()

    reading = Reading(4096, num_threads=2, before_block=before_block)
    source, adapter = opened(tmp_path / "a", base)
    read = reading.reader.begin(reading.room(source, adapter), adapter)
    reading.reader.start()
    reading.ended.get(timeout=DEADLINE_S)
    reading.reader.stop(DEADLINE_S)
    assert seen[:4] == [0, 0, 0, 0] and sorted(seen[4:]) == seen[4:]
    assert contents(read.image) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_value_that_is_not_finite_is_refused_with_its_tensor(
    tmp_path: Path, value: float, stored: str
) -> None:
    base = base_model(dtype=DType.BFLOAT16)
    name = tensor_name(1, "v_proj", "lora_B")
    values = np.zeros((32, 8), np.float32)
    values[31, 7] = value
    tensors = random_tensors(base, dtype=stored) | {name: StoredTensor.of(values, stored)}
    read = Reading(1 << 20).read(write_folder(tmp_path / "a", tensors, config_fields()), base)
    assert read.error is not None and not read.image.verified
    assert read.error.message == f"tensor '{name}' has a value that is infinite or not a number"


def test_overflow_is_refused_with_its_tensor(tmp_path: Path) -> None:
    base = base_model(dtype=DType.FLOAT16)
    name = tensor_name(0, "q_proj", "lora_A")
    values = np.full((8, 64), 70_000, np.float32)
    tensors = random_tensors(base) | {name: StoredTensor.of(values)}
    read = Reading(1 << 20).read(write_folder(tmp_path / "a", tensors, config_fields()), base)
    assert read.error is not None
    assert read.error.message == f"tensor '{name}' has a value too great for float16"


def test_read_that_fails_is_told_with_the_systems_reason(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base)
    source, adapter = opened(tmp_path / "a", base)
    write_only = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    # As a disk that fails, so may a descriptor.
    os.dup2(write_only, adapter.files.fds[1])
    reading = Reading(1 << 20)
    read = reading.reader.begin(reading.room(source, adapter), adapter)
    reading.reader.start()
    assert reading.ended.get(timeout=DEADLINE_S) is read
    reading.reader.stop(DEADLINE_S)
    os.close(write_only)
    assert read.error is not None and not read.image.verified
    assert read.error.message == f"can not read {tmp_path / 'a'}: Bad file descriptor"


def rewrite(path: Path, payload: bytes) -> None:
    with path.open("r+b") as file:
        file.write(payload)


def rewrite_and_set_back(path: Path, payload: bytes) -> None:
    before = path.stat()
    rewrite(path, payload)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path, payload: bytes) -> None:
    os.truncate(path, len(payload) // 2)


def append(path: Path, payload: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace(path: Path, payload: bytes) -> None:
    newer = path.with_suffix(".new")
    newer.write_bytes(payload)
    newer.replace(path)


def remove(path: Path, payload: bytes) -> None:
    path.unlink()


CHANGES: Mapping[str, Callable[[Path, bytes], None]] = {
    function.__name__: function
    for function in (rewrite, rewrite_and_set_back, truncate, append, replace, remove)
}


@pytest.mark.parametrize("change", CHANGES)
def test_file_that_changes_at_any_point_fails_the_load_or_gives_one_generation(
    tmp_path: Path, change: str
) -> None:
    base = base_model()
    tensors = write_adapter(tmp_path / "a", base, seed=1)
    expected = image_bytes(base, tensors)
    original = (tmp_path / "a" / TENSORS).read_bytes()
    write_adapter(tmp_path / "b", base, seed=2)
    other = (tmp_path / "b" / TENSORS).read_bytes()
    block_bytes, num_blocks = 3000, 0
    for changed_at in range(100):
        path = write_folder(tmp_path / "a", original, None) / TENSORS
        count = iter(range(1000))

        def before_block(
            _: Block, path: Path = path, count: object = count, changed_at: int = changed_at
        ) -> None:
            if next(count) == changed_at:  # type: ignore[call-overload]
                CHANGES[change](path, other)

        read = Reading(block_bytes, before_block=before_block).read(tmp_path / "a", base)
        num_blocks = read.blocks.table.num_blocks
        if changed_at >= num_blocks:
            break
        # A file that was replaced or removed is still there for those who have it open.
        if change in ("replace", "remove"):
            assert read.error is None and contents(read.image) == expected
        else:
            assert read.error is not None and not read.image.verified
            assert "changed while it was read" in read.error.message or "cut short" in (
                read.error.message
            )
    assert num_blocks > 5


def test_cancelled_read_ends_when_its_block_in_flight_does(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base)
    begun, may_go = threading.Event(), threading.Event()

    def before_block(_: Block) -> None:
        begun.set()
        assert may_go.wait(DEADLINE_S)

    reading = Reading(1000, before_block=before_block)
    source, adapter = opened(tmp_path / "a", base)
    read = reading.reader.begin(reading.room(source, adapter), adapter)
    reading.reader.start()
    assert begun.wait(DEADLINE_S)
    reading.reader.cancel(read)
    assert reading.ended.empty()
    may_go.set()
    assert reading.ended.get(timeout=DEADLINE_S) is read
    reading.reader.stop(DEADLINE_S)
    assert read.error is not None and read.blocks.num_begun == 1


def test_cancelled_read_that_never_began_ends_at_once(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base)
    reading = Reading(1000)
    source, adapter = opened(tmp_path / "a", base)
    read = reading.reader.begin(reading.room(source, adapter), adapter)
    before = len(os.listdir("/proc/self/fd"))
    reading.reader.cancel(read)
    assert reading.ended.get_nowait() is read
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_most_urgent_read_goes_first(tmp_path: Path) -> None:
    base = base_model()
    order: list[str] = []
    reading = Reading(1 << 20, before_block=lambda _: order.append("block"))
    reads = []
    for name in ("a", "b", "c"):
        write_adapter(tmp_path / name, base)
        source, adapter = opened(tmp_path / name, base)
        reads.append(reading.reader.begin(reading.room(source, adapter), adapter))
    reading.reader.order([reads[2], reads[0]])
    reading.reader.start()
    ended = [reading.ended.get(timeout=DEADLINE_S) for _ in reads]
    reading.reader.stop(DEADLINE_S)
    assert ended == [reads[2], reads[0], reads[1]]


def test_read_that_becomes_more_urgent_is_next_after_the_block_in_flight(tmp_path: Path) -> None:
    base = base_model()
    begun, may_go = threading.Event(), threading.Event()
    num_begun: list[tuple[int, int]] = []

    def before_block(_: Block) -> None:
        num_begun.append((reads[0].blocks.num_begun, reads[1].blocks.num_begun))
        begun.set()
        assert may_go.wait(DEADLINE_S)

    reading = Reading(1000, before_block=before_block)
    reads = []
    for name in ("a", "b"):
        write_adapter(tmp_path / name, base)
        source, adapter = opened(tmp_path / name, base)
        reads.append(reading.reader.begin(reading.room(source, adapter), adapter))
    reading.reader.start()
    assert begun.wait(DEADLINE_S)
    reading.reader.order([reads[1], reads[0]])
    may_go.set()
    assert [reading.ended.get(timeout=DEADLINE_S) for _ in reads] == [reads[1], reads[0]]
    reading.reader.stop(DEADLINE_S)
    count = reads[0].blocks.table.num_blocks
    assert count > 5
    urgent = [(1, index) for index in range(1, count + 1)]
    assert num_begun == [(1, 0), *urgent, *((index, count) for index in range(2, count + 1))]


def test_finished_blocks_are_told_while_their_thread_goes_on(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base)
    told: queue.Queue[int] = queue.Queue()
    seen: list[int] = []

    def before_block(block: Block) -> None:
        # The only thread that reads does not go on before it has been told of the block before.
        while block.start > 0 and (not seen or seen[-1] < block.start):
            seen.append(told.get(timeout=DEADLINE_S))

    ended: queue.Queue[ImageRead] = queue.Queue()
    source, adapter = opened(tmp_path / "a", base)
    image = HostTier(1 << 20).reserve(source.generation, adapter.plan.layout, [])
    assert image is not None
    reader = Reader(1, 1000, lambda: told.put(image.num_ready), ended.put, before_block)
    read = reader.begin(image, adapter)
    reader.start()
    assert ended.get(timeout=DEADLINE_S) is read
    reader.stop(DEADLINE_S)
    assert read.error is None and seen == read.blocks.table.starts[1:-1].tolist()


def test_every_block_is_read_once_by_whichever_thread_comes(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base, modules=ALL_MODULES)
    starts: list[int] = []
    reading = Reading(500, num_threads=4, before_block=lambda block: starts.append(block.start))
    read = reading.read(tmp_path / "a", base)
    assert read.error is None and len(starts) > 50
    assert sorted(starts) == read.blocks.table.starts[:-1].tolist()


def test_stop_begins_no_further_block_and_leaves_no_descriptor(tmp_path: Path) -> None:
    base = base_model()
    write_adapter(tmp_path / "a", base)
    begun, may_go = threading.Event(), threading.Event()

    def before_block(_: Block) -> None:
        begun.set()
        assert may_go.wait(DEADLINE_S)

    num_open = len(os.listdir("/proc/self/fd"))
    reading = Reading(1000, before_block=before_block)
    source, adapter = opened(tmp_path / "a", base)
    read = reading.reader.begin(reading.room(source, adapter), adapter)
    reading.reader.start()
    assert begun.wait(DEADLINE_S)
    reading.reader.stop(0.0)
    may_go.set()
    reading.reader.stop(DEADLINE_S)
    assert read.blocks.num_begun == 1 and reading.ended.empty()
    adapter.files.close()
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_defect_in_one_read_fails_that_read_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_model()
    attempts = iter([RuntimeError("boom"), None])

    def before_block(_: Block) -> None:
        if (error := next(attempts)) is not None:
            raise error

    reading = Reading(1 << 20, before_block=before_block)
    for name in ("a", "b"):
        write_adapter(tmp_path / name, base)
        make_old(tmp_path / name)
        source, adapter = opened(tmp_path / name, base)
        reading.reader.begin(reading.room(source, adapter), adapter)
    reading.reader.start()
    first, second = (reading.ended.get(timeout=DEADLINE_S) for _ in range(2))
    reading.reader.stop(DEADLINE_S)
    assert first.error is not None and "boom" in first.error.message
    assert second.error is None
