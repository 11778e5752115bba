"""The parts that compute run from end to end with toys on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_checks.command import PARTS, main

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["accuracy", "decode", "prefill"])
def test_a_part_leaves_its_report(part: str, tmp_path: Path) -> None:
    arguments = ["--part", part, "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    assert main(arguments) == 0
    document = json.loads((tmp_path / f"{part}.json").read_text())
    assert (document["part"], document["machine"]) == (part, "CPU")
    assert len(document["figures"]) >= 5


@pytest.mark.slow
def test_with_toys_the_engine_is_as_close_to_transformers_as_its_own_rounding(
    tmp_path: Path,
) -> None:
    main(["--part", "accuracy", "--device", "cpu", "--tiny", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "accuracy.json").read_text())
    goals = [figure for figure in document["figures"] if figure["goal"] is not None]
    assert len(goals) == 6
    assert [figure["name"] for figure in goals if not figure["met"]] == []


def test_the_script_names_every_part() -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check"), "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert all(part in answer.stdout for part in PARTS)
