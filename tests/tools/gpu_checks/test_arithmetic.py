"""Bytes and operations of the steps that are measured."""

from pathlib import Path

import pytest

from engine.models.config import read_model_config
from ipc.base_model import DType
from ipc.image import layout_image
from tools.gpu_checks.arithmetic import (
    all_linear_modules,
    decode_step_bytes,
    merged_length,
    prefill_flops,
    prefill_norm_bytes,
    prefill_product_flops,
    prefill_rope_bytes,
    prefill_silu_bytes,
)
from tools.shapes import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path, "llama-3.1-8b")


def test_a_decode_step_of_the_8b_shape_reads_fifteen_gigabytes(folder: Path) -> None:
    model = read_model_config(folder)
    base = model.base_model(DType.BFLOAT16)
    without_kv = decode_step_bytes(model, base, 1, 0)
    assert without_kv == pytest.approx(15.0e9, rel=0.01)
    # A token's keys and values are 131,072 bytes.
    assert decode_step_bytes(model, base, 32, 128) - without_kv == 32 * 128 * 131072


def test_eight_prompts_of_2048_tokens_are_237_teraflop(folder: Path) -> None:
    model = read_model_config(folder)
    flops = prefill_flops(model, model.base_model(DType.BFLOAT16), 8, 2048)
    assert flops == pytest.approx(237e12, rel=0.005)


def test_most_of_them_are_matrix_products(folder: Path) -> None:
    model = read_model_config(folder)
    base = model.base_model(DType.BFLOAT16)
    # 6.98e9 weights of linears, 16,384 tokens; 0.53e9 of the head, 8 tokens.
    products = prefill_product_flops(model, base, 8, 2048)
    assert products == pytest.approx(2 * 6.98e9 * 16384, rel=0.001)


def test_what_elementwise_kernels_must_read_and_write(folder: Path) -> None:
    model = read_model_config(folder)
    base = model.base_model(DType.BFLOAT16)
    # A norm that adds to the residual: two rows of 4,096 read, two written.
    assert prefill_norm_bytes(model, base, 10) == 10 * (63 * 4 + 2) * 4096 * 2
    # 48 heads of 128 read, 40 written, 16 stored; 64 cosines, 64 sines.
    assert prefill_rope_bytes(model, base, 10) == 10 * 32 * ((48 + 40 + 16) * 128 * 2 + 512)
    assert prefill_silu_bytes(model, base, 10) == 10 * 32 * 3 * 14336 * 2


def test_an_all_linear_adapter_takes_five_megabytes_a_rank(folder: Path) -> None:
    base = read_model_config(folder).base_model(DType.BFLOAT16)
    num_bytes = layout_image(base, all_linear_modules(base, 256, 1.0)).num_bytes
    assert num_bytes == 256 * 81920 * 2 * 32


def test_overlapping_intervals_count_once_and_short_gaps_count_as_covered() -> None:
    intervals = [(10.0, 12.0), (0.0, 4.0), (3.0, 5.0), (13.0, 14.0), (30.0, 31.0)]
    assert merged_length(intervals, 0.0) == 5 + 2 + 1 + 1
    assert merged_length(intervals, 1.0) == 5 + 4 + 1
    assert merged_length([], 1.0) == 0
