"""The benchmark of chunks runs to its end, with as many copies as the layouts ask for."""

import asyncio

import pytest

from engine.config import DeviceKind
from tools.bench_chunks import run, table


@pytest.mark.slow
def test_both_adapters_are_loaded_and_paid_for() -> None:
    figures = asyncio.run(run(DeviceKind.CPU, rate=0.0, num_chunks=200))
    long, short = figures["long layers"], figures["short layers"]
    assert long["chunks"] >= 200 and short["chunks"] >= 200
    # 32 layers of one and a quarter chunk each, and 32 that fill two chunks and a half.
    assert long["copies_per_chunk"] == pytest.approx((32 + 39) / 40)
    assert short["copies_per_chunk"] == pytest.approx((32 + 2) / 3)
    assert all(0 < row["placer_us"] <= row["process_us"] for row in figures.values())
    assert "short layers" in table(figures)
