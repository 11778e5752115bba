"""Row scales and biases of adapters in the kernels, against an fp32 loop."""

import pytest
import torch

from engine.lora.graph_variant import GraphVariant
from ipc.base_model import DType
from tests.engine.lora.rig import LoraRig, product_of, segments_of
from tests.engine.lora.test_triton_linear import DTYPES, begin
from tests.engine.lora_images import make_image

# Numbers 11 to 14 have row scales or biases; of 3 and 6, linears or a whole group are missing.
MIXTURE = [None, 2, 3, 6, 10, 11, 12, 13, 14]


@pytest.fixture(scope="module")
def rigs() -> dict[DType, LoraRig]:
    """Filled on demand."""
    return {}


def rig_of(rigs: dict[DType, LoraRig], dtype: DType) -> LoraRig:
    if dtype not in rigs:
        rigs[dtype] = LoraRig(dtype)
        rigs[dtype].install_all_ranks()
        rigs[dtype].install_row_scales()
    return rigs[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_counts", [[2, 1, 1, 1, 1, 1, 1, 1, 1], [0, 2, 1, 0, 3, 16, 0, 2, 17]])
def test_small_segments_with_and_without(
    rigs: dict[DType, LoraRig], dtype: DType, row_counts: list[int]
) -> None:
    rig = rig_of(rigs, dtype)
    segments = segments_of(MIXTURE, row_counts)
    step = begin(rig, rig.lora(), segments)
    for layer, group in ((0, 0), (1, 1), (0, 2), (1, 3)):
        rig.add_and_check(step, segments, layer, group, sum(row_counts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", range(4))
def test_large_segments_with_and_without(
    rigs: dict[DType, LoraRig], dtype: DType, group: int
) -> None:
    rig = rig_of(rigs, dtype)
    # A tile's edge, one row more, a few rows more; single rows beside them.
    longest = 333 if torch.cuda.is_available() else 75
    segments = segments_of([None, 12, 13, 9, 14, 11], [2, 32, 33, 1, longest, 40])
    step = begin(rig, rig.lora(), segments)
    rig.add_and_check(step, segments, 1, group, longest + 108)


def test_tiles_that_were_captured_scale_rows(rigs: dict[DType, LoraRig]) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    tiled = rig.lora().tiled_steps(80)
    segments = segments_of([None, 14, 2, 13], [3, 33, 1, 20])
    step = tiled.step(80, tiled.fill(segments, 80))
    rig.add_and_check(step, segments, 0, 0, 80)


@pytest.mark.parametrize("forks", [False, True])
def test_a_captured_step_of_any_adapters_computes_in_place(
    rigs: dict[DType, LoraRig], forks: bool
) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    step = rig.lora(forks=forks).graph_step(16)
    for numbers in (MIXTURE, [14], [2, 3]):
        segments = segments_of(numbers, [1] * len(numbers))
        step.fill(segments)
        rig.add_and_check(step.in_place, segments, 1, 0, 16)


def test_a_bias_alone_is_a_part_of_the_delta(rigs: dict[DType, LoraRig]) -> None:
    rig = rig_of(rigs, DType.FLOAT32)
    step = rig.lora().graph_step(24)
    segments = segments_of([None, 3, 10, 11], [2, 1, 3, 17])
    step.fill(segments)
    for group, columns in enumerate(rig.groups):
        x, before = rig.inputs(columns, 24)
        with rig.device.forward_stream():
            projected = step.project(0, columns, x, product_of(before))
        rig.device.synchronize()
        assert projected.delta is not None and torch.equal(projected.out, before)
        rig.add_and_check(step, segments, 0, group, 24)


@pytest.mark.parametrize(
    ("numbers", "variant"),
    [
        ([None, 1, 2, 10], GraphVariant.BESIDE),
        ([None, 11, 2], GraphVariant.BESIDE),
        ([12], GraphVariant.IN_PLACE),
        ([None, *range(1, 12), 13], GraphVariant.IN_PLACE),
    ],
)
def test_one_adapter_with_row_scales_sends_a_batch_to_the_launches_in_place(
    rigs: dict[DType, LoraRig], numbers: list[int | None], variant: GraphVariant
) -> None:
    step = rig_of(rigs, DType.FLOAT32).lora().graph_step(16)
    assert step.fill(segments_of(numbers, [1] * len(numbers))) is variant
    assert step.fill(segments_of([2], [1])) is GraphVariant.BESIDE


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_by_one_and_adding_nothing_change_no_bit(dtype: DType) -> None:
    rig = LoraRig(dtype)
    plain = rig.images[rig.install(2, 12)]
    ones = {key: torch.ones(len(b)) for key, (_, b) in plain.pairs.items()}
    zeros = {key: torch.zeros(len(b)) for key, (_, b) in plain.pairs.items()}
    rig.install_image(3, make_image(rig.base, list(plain.modules), plain.pairs, ones, zeros))
    for row_counts in ([1], [5], [40]):
        x, before = rig.inputs(rig.groups[0], row_counts[0])
        outs = []
        for number in (2, 3):
            step = begin(rig, rig.lora(), segments_of([number], row_counts))
            rig.device.synchronize()
            with rig.device.forward_stream():
                outs.append(step.project(0, rig.groups[0], x, product_of(before)).total())
            rig.device.synchronize()
        assert torch.equal(*outs)
