"""The benchmark of loading runs to its end, and checks every byte on its way."""

import asyncio
from pathlib import Path

import pytest

from engine.config import DeviceKind
from engine.device import open_device
from ipc.endpoints import RunFolder
from tools.bench_load import Sizes, measure, table
from tools.load_baselines import MiB

SIZES = Sizes(
    num_layers=2,
    rank=16,
    chunk_bytes=1 * MiB,
    num_chunks=4,
    host_tier_bytes=32 * MiB,
    num_warm=2,
    repeats=3,
)


@pytest.mark.slow
def test_every_case_places_the_right_bytes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    device = open_device(DeviceKind.AUTO)
    figures = asyncio.run(measure(device, SIZES, RunFolder(tmp_path / "run"), tmp_path))
    assert figures["image_bytes"] == 2 * 16 * 81_920 * 2
    assert len(figures["host_tier_s"]) == 3 and figures["kills"][0]["placed_s"] > 0.0
    assert "host tier to slot, queued" in table(figures)
