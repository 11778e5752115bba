"""The benchmark of reading runs to its end on any machine."""

from pathlib import Path

import pytest

from tools.bench_read import DTYPES, OWN_BLOCK_MIB, Plan, ensure_cached, measure, shape_of, table
from tools.load_baselines import MiB


def test_every_case_is_measured_beside_its_bound(tmp_path: Path) -> None:
    plan = Plan(num_bytes=3 * MiB, thread_counts=(1, 2), blocks_mib=(1, 2), num_rounds=2)
    figures = measure(plan, tmp_path)
    assert 2 * MiB < figures["image_bytes"] < 4 * MiB
    assert [row["num_threads"] for row in figures["rows"]] == [1, 2]
    for row in figures["rows"]:
        assert row["bound_gb_s"] > 0.0
        assert list(row["blocks"]) == ["1 MiB", "2 MiB"] and set(row["stored"]) == {"fp32", "fp16"}
        for figure in (*row["blocks"].values(), *row["stored"].values()):
            assert figure["gb_s"] > 0.0 and figure["ratio"] > 0.0
    assert {len(case["s"]) for case in figures["seconds"]} == {2}
    last = table(figures).splitlines()[-2:]
    assert [line.split()[0] for line in last] == ["1", "2"]


def test_own_block_size_is_measured_once() -> None:
    cases = Plan(1, (4,), (OWN_BLOCK_MIB, 64), 1).cases()
    assert len(set(cases)) == len(cases) == 1 + 2 + len(DTYPES) - 1


@pytest.mark.parametrize("num_bytes", [3 * MiB, 100 * MiB, 1342177280])
def test_shape_has_about_as_many_bytes_as_were_asked_for(num_bytes: int) -> None:
    num_layers, rank = shape_of(num_bytes)
    assert rank % 8 == 0
    assert num_layers * rank * 81_920 * 2 == pytest.approx(num_bytes, rel=0.3)


def test_file_that_was_written_is_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * MiB))
    ensure_cached(path)
