"""The benchmark of formats measures each of them."""

from pathlib import Path

import pytest

from tools import bench_dequantize
from tools.bench_dequantize import CASES, measure, table


def test_every_format_is_measured_by_every_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_dequantize, "NUM_VALUES", 1 << 17)
    monkeypatch.setattr(bench_dequantize, "NUM_ROUNDS", 2)
    figures = measure(tmp_path, [1, 2])
    ours = [each for each in figures if "package" not in each.case]
    assert len(figures) == len(ours) + 1
    assert [(each.case, each.num_threads) for each in ours] == [
        (case.name, count) for case in CASES for count in (1, 2)
    ]
    assert all(each.image_gb_s > 0 and each.ratio > 0 for each in figures)
    assert len(table(figures).splitlines()) == 1 + len(figures)
