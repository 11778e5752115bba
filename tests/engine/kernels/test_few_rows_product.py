"""Products of few rows against plain torch."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.cuda_ops import FusedOps
from engine.kernels.few_rows_product import (
    ALL_ROWS,
    BESIDE,
    MAX_ROWS,
    SIXTEEN_ROWS,
    ProductScratch,
    ProductTuning,
    few_rows_product,
    tuning_for,
)
from engine.kernels.overlap import may_overlap
from tests.engine.kernels.dtypes import DTYPES, assert_near

# Two tiles of columns and up to four splits of the inputs in the smallest shapes. fp32 takes twice
# the shared memory.
SMALL = ProductTuning(tile_inputs=64, num_stages=2)
NUM_PROCESSORS = 4


def scratch_on(device: torch.device, num_processors: int = NUM_PROCESSORS) -> ProductScratch:
    """What it does not promise to hold is NaN."""
    scratch = ProductScratch(num_processors, device)
    scratch.partial.fill_(float("nan"))
    return scratch


def operands(
    num_rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(num_rows, in_features, device=device)
    weight = torch.randn(out_features, in_features, device=device) * in_features**-0.5
    bias = torch.randn(out_features, device=device)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 16, 17, MAX_ROWS])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(64, 64), (128, 320), (72, 100), (8, 40), (520, 72)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_each_row_is_multiplied(
    dtype: torch.dtype,
    num_rows: int,
    out_features: int,
    in_features: int,
    has_bias: bool,
    device: torch.device,
) -> None:
    x, weight, given = operands(num_rows, out_features, in_features, dtype, device)
    bias = given if has_bias else None
    scratch = scratch_on(device)
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias
    # Again, because the counters of the first launch are those of the second.
    first, second = (
        few_rows_product(x, weight, bias, scratch, SMALL, may_overlap(device)) for _ in range(2)
    )
    assert_near(first, expected)
    assert torch.equal(first, second)
    assert not scratch.arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, bias = operands(MAX_ROWS, 128, 256, dtype, device)
    scratch = scratch_on(device)

    def multiply(rows: Tensor) -> Tensor:
        return few_rows_product(rows, weight, bias, scratch, SMALL, may_overlap(device))

    together = multiply(x)
    x[7:] = float("nan")
    for num_rows in (1, 7, 20):
        assert torch.equal(multiply(x[:num_rows])[:7], together[: min(num_rows, 7)])


@pytest.mark.parametrize("tuning", [SIXTEEN_ROWS, ALL_ROWS, BESIDE, SMALL])
def test_every_program_has_work_and_all_can_run_at_once(tuning: ProductTuning) -> None:
    sizes = (1, 64, 65, 1000, 4096, 6144, 28672, 128256)
    for out_features, in_features, num_processors in product(sizes, sizes, (1, 7, 132)):
        num_tiles, num_splits = tuning.cut(out_features, in_features, num_processors)
        assert (num_tiles - 1) * tuning.tile_columns < out_features
        assert num_tiles * tuning.tile_columns >= out_features
        num_steps = -(-in_features // tuning.tile_inputs)
        ends = [split * num_steps // num_splits for split in range(num_splits + 1)]
        assert all(first < last for first, last in pairwise(ends))
        if num_splits > 1:
            assert num_tiles * num_splits <= tuning.fill * num_processors


def test_what_runs_beside_adapters_leaves_them_half_of_the_shared_memory() -> None:
    for num_rows in (1, MAX_ROWS):
        tuning = tuning_for(num_rows, overlaps=False)
        tile_values = (tuning.tile_columns + MAX_ROWS) * tuning.tile_inputs
        assert 2 * tile_values * tuning.num_stages <= 227 << 9


def test_without_a_gpu_products_are_the_librarys() -> None:
    ops = FusedOps(1e-5, torch.device("cpu"))
    x, weight, bias = operands(3, 40, 24, torch.float16, torch.device("cpu"))
    assert torch.equal(ops.linear(x, weight, bias), functional.linear(x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096), (32003, 1000)],
)
@pytest.mark.parametrize("is_beside", [False, True])
def test_products_of_models_are_as_near_as_the_librarys(
    dtype: torch.dtype, out_features: int, in_features: int, is_beside: bool, device: torch.device
) -> None:
    ops = FusedOps(1e-5, device)
    for num_rows in (1, 8, 17, MAX_ROWS, MAX_ROWS + 1):
        x, weight, bias = operands(num_rows, out_features, in_features, dtype, device)
        got = ops.linear(x, weight, bias, is_beside=is_beside)
        expected = x.double() @ weight.double().T + bias
        if dtype is torch.float32:
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        else:
            assert_near(got, expected)
