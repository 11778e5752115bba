"""The kernels, through the backend, against an fp32 loop."""

import os
import random
from collections.abc import Callable

import pytest
import torch

from engine.lora.linear import LoraStep
from engine.lora.segments import Segment
from engine.lora.triton_linear import TritonLora
from ipc.base_model import DType
from ipc.messages import AdapterId
from tests.engine.lora.rig import RANKS, LoraRig, product_of, segments_of

# The interpreter rounds bf16 down instead of to the nearest.
DTYPES = (
    DType.FLOAT32,
    DType.FLOAT16,
    pytest.param(DType.BFLOAT16, marks=pytest.mark.gpu),
)


def _zipf(row: int, rng: random.Random) -> int:
    return rng.choices(range(1, 11), [1 / number for number in range(1, 11)])[0]


POPULARITY: dict[str, Callable[[int, random.Random], int | None]] = {
    "distinct": lambda row, rng: 1 + row % len(RANKS),
    "uniform": lambda row, rng: rng.choice([None, *range(1, 11)]),
    "zipf": _zipf,
    "identical": lambda row, rng: 9,
    "skewed": lambda row, rng: 10 if row % 8 == 0 else 2,
    "base alone": lambda row, rng: None,
}


@pytest.fixture(scope="module")
def rigs() -> dict[DType, LoraRig]:
    """Filled on demand."""
    return {}


def begin(rig: LoraRig, lora: TritonLora, segments: tuple[Segment, ...]) -> LoraStep:
    with rig.device.forward_stream():
        return lora.begin(segments)


def rig_of(rigs: dict[DType, LoraRig], dtype: DType) -> LoraRig:
    if dtype not in rigs:
        rigs[dtype] = LoraRig(dtype)
        rigs[dtype].install_all_ranks()
    return rigs[dtype]


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_each_row_gets_its_own_adapters_delta_and_nothing_else(
    rigs: dict[DType, LoraRig], dtype: DType, popularity: str, rng: random.Random
) -> None:
    rig = rig_of(rigs, dtype)
    lora = rig.lora()
    for num_rows in (0, 1, 15, 16, 17):
        numbers = [POPULARITY[popularity](row, rng) for row in range(num_rows)]
        segments = segments_of(numbers, [1] * num_rows)
        rig.add_and_check(begin(rig, lora, segments), segments, num_rows % 2, 0, num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_linear_of_every_layer_finds_its_own_weights(
    rigs: dict[DType, LoraRig], dtype: DType
) -> None:
    rig = rig_of(rigs, dtype)
    segments = segments_of([1, 3, 6, 9, None, 4], [1, 2, 1, 1, 2, 34])
    step = begin(rig, rig.lora(), segments)
    for layer in (0, 1):
        for group in range(4):
            rig.add_and_check(step, segments, layer, group, 41)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_segments_of_many_rows_of_any_rank(
    rigs: dict[DType, LoraRig], dtype: DType, rank: int
) -> None:
    rig = rig_of(rigs, dtype)
    number = 1 + RANKS.index(rank)
    longest = 333 if torch.cuda.is_available() else 75
    # A tile's edge, one row more, some tiles; a few single rows beside them.
    segments = segments_of([number, 2, 7, None, 10], [longest, 32, 33, 3, 1])
    step = begin(rig, rig.lora(), segments)
    rig.add_and_check(step, segments, 1, rank % 4, longest + 69)


def test_small_segments_beyond_the_room_for_them_are_computed_as_well(
    rigs: dict[DType, LoraRig],
) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    count = rig.tuning.max_few_rows
    num_segments = min(10, rig.tuning.max_small_rows // count + 2)
    segments = segments_of(range(1, 1 + num_segments), [count] * num_segments)
    step = begin(rig, rig.lora(), segments)
    rig.add_and_check(step, segments, 0, 1, num_segments * count)


def test_steps_may_begin_before_earlier_ones_are_launched(rigs: dict[DType, LoraRig]) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    lora = rig.lora()
    first, second = segments_of([3, 5], [1, 1]), segments_of([8, 4], [1, 1])
    steps = [(begin(rig, lora, segments), segments) for segments in (first, second)]
    for step, segments in steps:
        rig.add_and_check(step, segments, 0, 0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forks", [False, True])
def test_a_graph_step_computes_what_it_was_last_filled_with(
    rigs: dict[DType, LoraRig], dtype: DType, forks: bool
) -> None:
    rig = rig_of(rigs, dtype)
    step = rig.lora(forks=forks).graph_step(40)
    rig.add_and_check(step, (), 0, 0, 40)
    for numbers, row_counts in (
        ([None, *range(1, 11)], [30] + [1] * 10),
        ([9], [40]),
        ([2, 10, 5], [17, 1, 22]),
        ([None], [40]),
    ):
        segments = segments_of(numbers, row_counts)
        step.fill(segments)
        rig.add_and_check(step, segments, 1, 0, 40)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 8])
def test_a_short_list_of_work_is_not_read_beyond_its_end(
    num_rows: int, rigs: dict[DType, LoraRig]
) -> None:
    # What lies there is of no effect: only a tool that watches memory sees it read.
    rig = rig_of(rigs, DType.FLOAT32)
    step = rig.lora().graph_step(num_rows)
    for numbers in ([10] * num_rows, [1 + row for row in range(num_rows)]):
        segments = segments_of(numbers, [1] * num_rows)
        step.fill(segments)
        for group in range(4):
            rig.add_and_check(step, segments, 0, group, num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tiled_step_computes_what_it_was_last_filled_with(
    rigs: dict[DType, LoraRig], dtype: DType
) -> None:
    rig = rig_of(rigs, dtype)
    longest = rig.tuning.shrink_many.tile_rows + 9
    tiled = rig.lora().tiled_steps(longest)
    # The lowest rank that launches are for, one between two, the highest; then nobody.
    for number_of_most, expected_rank in ((4, 16), (7, 64), (10, 256), (None, 16)):
        segments = segments_of([None, 3, number_of_most], [2, 5, longest - 7])
        if number_of_most is None:
            segments = ()
        assert tiled.fits(segments, longest)
        rank = tiled.fill(segments, longest)
        assert rank == expected_rank
        rig.add_and_check(tiled.step(longest, rank), segments, 1, 0, longest)


def test_a_tiled_step_has_tiles_for_some_segments_only(rigs: dict[DType, LoraRig]) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    tiled = rig.lora().tiled_steps(10)
    assert tiled.fits(segments_of(range(1, 6), [1] * 5), 5)
    assert not tiled.fits(segments_of(range(1, 7), [1] * 6), 6)
    # Fewer rows, fewer tiles: a whole one ends where the next begins.
    tile_rows = rig.tuning.shrink_many.tile_rows
    longer = rig.lora().tiled_steps(2 * tile_rows)
    assert longer.fits(segments_of(range(1, 6), [tile_rows] + [1] * 4), tile_rows + 4)
    assert not longer.fits(segments_of(range(1, 7), [tile_rows] + [1] * 5), tile_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_apart_gives_what_is_given_in_place(
    rigs: dict[DType, LoraRig], dtype: DType, rng: random.Random
) -> None:
    rig = rig_of(rigs, dtype)
    lora, in_place = (rig.lora(forks=forks).graph_step(48) for forks in (True, False))
    # Every rank alone and among several rows; every third adapter lacks linears, or a whole group.
    numbers = [None, *range(1, 11), *range(1, 11)]
    segments = segments_of(numbers, [5] + [1] * 10 + [rng.randint(0, 3) for _ in range(10)])
    for step in (lora, in_place):
        step.fill(segments)
    for layer, group in ((0, 0), (1, 1), (0, 2), (1, 3)):
        x, before = rig.inputs(rig.groups[group], 48)
        rig.device.synchronize()
        with rig.device.forward_stream():
            apart = lora.project(layer, rig.groups[group], x, product_of(before))
            added = in_place.project(layer, rig.groups[group], x, product_of(before))
        rig.device.synchronize()
        assert torch.equal(apart.out, before) and added.delta is None
        if torch.cuda.is_available():
            # The compiler fuses scaling and sum in place, which saves one rounding in fp32.
            rtol = 2 * torch.finfo(rig.dtype).eps
            torch.testing.assert_close(apart.total(), added.out, rtol=rtol, atol=1e-6)
        else:
            assert torch.equal(apart.total(), added.out)


def test_values_that_nobody_writes_are_those_of_rows_without_an_adapter(
    rigs: dict[DType, LoraRig],
) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    step = rig.lora().graph_step(8)
    # Number 3 has nothing for the linears of the last group in any layer.
    step.fill(segments_of([None, 3, 7], [3, 2, 1]))
    for group in range(4):
        x, before = rig.inputs(rig.groups[group], 8)
        with rig.device.forward_stream():
            projected = step.project(1, rig.groups[group], x, product_of(before))
        rig.device.synchronize()
        assert projected.delta is not None
        assert projected.delta.has_adapter.tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
        assert projected.delta.values[3:6].isfinite().all()
        assert projected.total().isfinite().all()
        # What the next projection finds: as if it were another's, and wrong.
        projected.delta.values.fill_(torch.nan)


@pytest.mark.gpu
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("forks", [False, True])
def test_a_captured_graph_replays_with_other_adapters(
    rigs: dict[DType, LoraRig], overlaps: bool, forks: bool, rng: random.Random
) -> None:
    if forks and "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        pytest.skip("sums are made in the graph, which needs torch's cache of memory")
    rig = rig_of(rigs, DType.BFLOAT16)
    step = rig.lora(overlaps, forks).graph_step(32)
    calls = [(layer, group) for layer in (0, 1) for group in rig.groups]
    given = [rig.inputs(group, 32) for _, group in calls]
    outs = [torch.empty_like(before) for _, before in given]
    totals: list[torch.Tensor] = []
    graph = torch.cuda.CUDAGraph()

    def add_all() -> None:
        totals[:] = [
            step.project(layer, group, x, product_of(out, copies=False)).total()
            for (layer, group), (x, _), out in zip(calls, given, outs, strict=True)
        ]

    rig.device.synchronize()
    with rig.device.forward_stream():
        add_all()
        rig.device.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            add_all()
    for _ in range(20):
        numbers = [rng.choice([None, *range(1, 11)]) for _ in range(rng.randint(0, 32))]
        segments = segments_of(numbers, [1] * len(numbers))
        with rig.device.forward_stream():
            for (_, before), out in zip(given, outs, strict=True):
                out.copy_(before)
            step.fill(segments)
            graph.replay()
        for (layer, group), (x, before), total in zip(calls, given, totals, strict=True):
            rig.check(segments, layer, group, x, before, total)


def test_an_adapter_installed_where_another_was_is_not_taken_for_it() -> None:
    rig = LoraRig(DType.FLOAT32)
    step = rig.lora().graph_step(2)
    # More than the table has places.
    for number in range(1, 40):
        rig.install(number, 1 + number % 20)
        if number > 2:
            rig.table.remove(AdapterId(number - 2))
        if number % 8 == 0:
            segments = segments_of([number - 1, number], [1, 1])
            step.fill(segments)
            rig.add_and_check(step, segments, 0, 0, 2)


def test_an_arena_may_be_larger_than_32_bits_can_address() -> None:
    # A CPU's memory that nobody touches is not taken from the machine.
    rig = LoraRig(DType.FLOAT16, pool_bytes=5 << 30)
    rig.install(1, 16)
    assert rig.table.records[0, 0, 0, 0] > 1 << 31
    for row_counts in ([1], [3], [70]):
        segments = segments_of([1], row_counts)
        step = begin(rig, rig.lora(), segments)
        rig.add_and_check(step, segments, 0, 0, row_counts[0])


def test_a_step_of_an_adapter_that_is_not_resident_is_an_error(rigs: dict[DType, LoraRig]) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    with pytest.raises(KeyError):
        begin(rig, rig.lora(), (Segment(AdapterId(77), 0, 1),))


def test_warming_up_needs_no_adapter() -> None:
    rig = LoraRig(DType.FLOAT16)
    lora = rig.lora()
    lora.warm_up()
    rig.install(1, 33)
    segments = segments_of([1], [40])
    rig.add_and_check(begin(rig, lora, segments), segments, 0, 0, 40)
