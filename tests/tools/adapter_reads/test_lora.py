"""Steps that only read: what they read, and in which launches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.lora.kernels import expand_few, shrink_few
from engine.lora.kernels.expand_few import ExpandFewTuning
from engine.lora.kernels.shapes import Weights
from engine.lora.launches import LoraLaunches, LoraTuning
from engine.lora.segments import Segment
from engine.lora.triton_linear import Fork, GraphStep, weights_in
from ipc.base_model import DType
from ipc.image import padded_rank
from tests.engine.lora.rig import LoraRig, product_of, segments_of
from tools.adapter_reads import kernel
from tools.adapter_reads.lora import NumLaunches, ReadLaunches, ReadLora

MAX_ROWS = 48
# A block of columns in two units, where ranks are large.
EXPAND = ExpandFewTuning(columns=(64, 64, 32, 64, 64, 32))
DTYPES = (DType.FLOAT32, DType.FLOAT16)


def rig_of(dtype: DType) -> LoraRig:
    rig = LoraRig(dtype)
    rig.install_all_ranks()
    return rig


@pytest.fixture(scope="module")
def rigs() -> dict[DType, LoraRig]:
    return {dtype: rig_of(dtype) for dtype in DTYPES}


def read_lora(rig: LoraRig, num_launches: NumLaunches) -> ReadLora:
    tuning = replace(rig.tuning, expand_few=EXPAND)
    return ReadLora(rig.base, rig.pool, rig.table, rig.device, MAX_ROWS, 256, tuning, num_launches)


def weights_of(rig: LoraRig) -> Weights:
    return weights_in(rig.pool, rig.table, rig.base)


def words_of(values: Tensor, dtype: torch.dtype) -> int:
    return int(values.to(dtype).contiguous().view(torch.int32).sum(dtype=torch.int64))


def entry_words(
    rig: LoraRig, segments: tuple[Segment, ...], layer: int, names: tuple[str, ...], b: bool
) -> int:
    """The words of these linears' A's or B's, of each as often as its segment has tiles of rows."""
    total = 0
    for segment in segments:
        pairs = rig.images[segment.adapter_id].pairs
        num_tiles = -(-(segment.stop - segment.start) // rig.tuning.tile_few_rows)
        for name in names:
            pair = pairs.get((rig.base.layer_stage(layer), name))
            if pair is None:
                continue
            padding = padded_rank(pair[0].shape[0]) - pair[0].shape[0]
            padded = pad(pair[1], (0, padding)) if b else pad(pair[0], (0, 0, 0, padding))
            total += num_tiles * words_of(padded, rig.dtype)
    return total


# By the numbers of the rig's adapters: every rank alone, then in a few rows, then in several tiles.
MIXTURES: dict[str, tuple[list[int | None], list[int]]] = {
    "each rank in a row": ([None, *range(1, 11)], [3] + [1] * 10),
    "each rank in rows": (list(range(1, 11)), [2 + number % 4 for number in range(10)]),
    "one in three tiles": ([None, 10], [1, 40]),
    "rows beside a row": ([9, 4, None, 8], [1, 17, 2, 5]),
    "base alone": ([None], [8]),
}


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_launches", [1, 2])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_projection_reads_its_as_and_bs_and_no_word_else(
    rigs: dict[DType, LoraRig], dtype: DType, num_launches: NumLaunches, mixture: str
) -> None:
    rig = rigs[dtype]
    lora = read_lora(rig, num_launches)
    step = lora.graph_step(MAX_ROWS)
    segments = segments_of(*MIXTURES[mixture])
    step.fill(segments)
    for layer, group in ((0, 0), (1, 1), (0, 2), (1, 3)):
        columns = rig.groups[group]
        names = tuple(each.module for each in columns)
        x, before = rig.inputs(columns, MAX_ROWS)
        rig.device.synchronize()
        with rig.device.forward_stream():
            projected = step.project(layer, columns, x, product_of(before))
            checksum = lora.take_checksum()
        expected = sum(entry_words(rig, segments, layer, names, b) for b in (False, True))
        assert checksum == expected % (1 << 32), (layer, names)
        assert projected.delta is None and torch.equal(projected.out, before)


def test_the_halves_of_a_projection_read_one_side_each(rigs: dict[DType, LoraRig]) -> None:
    rig = rigs[DType.FLOAT16]
    launches = ReadLaunches(rig.base, weights_of(rig), MAX_ROWS, MAX_ROWS, 256, rig.tuning, 2)
    step = GraphStep(launches, rig.table, rig.device, MAX_ROWS, rig.tuning, None)
    segments = segments_of([9, 10, 3], [1, 20, 2])
    step.fill(segments)
    x, out = rig.inputs(rig.groups[0], MAX_ROWS)
    rig.device.synchronize()
    names = tuple(each.module for each in rig.groups[0])
    launch_half: dict[bool, Callable[[], None]] = {
        False: lambda: step.segments.shrink(0, rig.groups[0], x),
        True: lambda: step.segments.expand(0, rig.groups[0], out),
    }
    for b, launch in launch_half.items():
        with rig.device.forward_stream():
            launch()
            checksum = launches.take_checksum()
        assert checksum == entry_words(rig, segments, 0, names, b) % (1 << 32), b


class Recorder:
    """Stands in for ``launch``, and keeps what the device would be asked for."""

    OPTIONS = ("num_warps", "maxnreg", "launch_pdl")

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __call__(self, kernel: object, grid: object, *arguments: object, **options: Any) -> None:
        self.launches.append((grid, *[options[name] for name in self.OPTIONS]))


def record_step(monkeypatch: pytest.MonkeyPatch, kind: str, num_rows: int) -> list[Any]:
    """All launches of one layer's graph step, on a device where launches may overlap."""
    rig, tuning, record = LoraRig(DType.FLOAT16), LoraTuning(), Recorder()
    for module in (shrink_few, expand_few, kernel):
        monkeypatch.setattr(module, "launch", record)
    common = rig.base, weights_of(rig), MAX_ROWS, MAX_ROWS, 256, tuning
    make: dict[str, Callable[[], LoraLaunches]] = {
        "real": lambda: LoraLaunches(*common),
        "reading": lambda: ReadLaunches(*common, 2),
        "in one": lambda: ReadLaunches(*common, 1),
    }
    launches = make[kind]()
    monkeypatch.setattr(launches, "_overlaps", True)
    fork = Fork(rig.base, MAX_ROWS, rig.device.torch_device, tuning)
    step = GraphStep(launches, rig.table, rig.device, num_rows, tuning, fork)
    for group in rig.groups:
        x, before = rig.inputs(group, num_rows)
        step.project(0, group, x, product_of(before))
    return record.launches


@pytest.mark.parametrize("num_rows", [1, MAX_ROWS])
def test_what_only_reads_is_launched_as_what_computes(
    monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    real = record_step(monkeypatch, "real", num_rows)
    assert record_step(monkeypatch, "reading", num_rows) == real
    assert all(launch[-1] for launch in real)


@pytest.mark.parametrize("num_rows", [1, MAX_ROWS])
def test_in_one_launch_a_projection_has_the_larger_grid_behind_the_fork(
    monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    real = record_step(monkeypatch, "real", num_rows)
    in_one = record_step(monkeypatch, "in one", num_rows)
    assert all(launch[-1] for launch in in_one)
    grids = [launch[0] for launch in real]
    largest = [max(halves) for halves in zip(grids[::2], grids[1::2], strict=True)]
    assert [launch[0] for launch in in_one] == largest


def test_a_list_without_room_is_read_to_its_end_and_its_checksum_taken_once(
    rigs: dict[DType, LoraRig],
) -> None:
    rig = rigs[DType.FLOAT32]
    lora = read_lora(rig, 1)
    step = lora.graph_step(1)
    segments = segments_of([10], [1])
    step.fill(segments)
    x, before = rig.inputs(rig.groups[1], 1)
    rig.device.synchronize()
    with rig.device.forward_stream():
        step.project(0, rig.groups[1], x, product_of(before))
        checksums = [lora.take_checksum() for _ in range(2)]
    expected = sum(entry_words(rig, segments, 0, ("o_proj",), b) for b in (False, True))
    assert checksums == [expected % (1 << 32), 0]
