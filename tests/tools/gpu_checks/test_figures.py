"""How a measured figure is judged and shown."""

import json
from pathlib import Path

from tools.gpu_checks.figures import Figure, Report


def test_a_goal_is_met_on_its_own_side_and_at_its_very_value() -> None:
    assert Figure("added", 1.6, 1.6).met
    assert Figure("added", 1.61, 1.6).met is False
    assert Figure("share", 0.8, 0.8, at_most=False).met
    assert Figure("share", 0.79, 0.8, at_most=False).met is False


def test_what_was_not_measured_or_has_no_goal_is_neither_met_nor_missed() -> None:
    report = Report("decode", "CPU", [Figure("a", None, 1.0, note="no GPU"), Figure("b", 7.0)])
    assert [figure.met for figure in report.figures] == [None, None]
    assert report.all_met


def test_one_missed_goal_is_enough() -> None:
    report = Report("decode", "CPU", [Figure("a", 1.0, 2.0), Figure("b", 3.0, 2.0)])
    assert not report.all_met


def test_not_a_number_meets_no_goal() -> None:
    assert Figure("difference", float("nan"), 0.1).met is False


def test_the_table_shows_every_figure_beside_its_goal() -> None:
    report = Report(
        "prefill",
        "NVIDIA H200",
        [
            Figure("base", 400.0, unit="ms"),
            Figure("rate", 0.75, 0.8, at_most=False),
            Figure("idle", None, 3.0, unit="%", note="no GPU"),
        ],
    )
    assert report.table().splitlines() == [
        "prefill on NVIDIA H200",
        "figure  measured  goal   met?",
        "------  --------  -----  ------",
        "base    400 ms",
        "rate    0.75      ≥ 0.8  NO",
        "idle    —         ≤ 3 %  no GPU",
    ]


def test_a_report_is_written_with_its_details(tmp_path: Path) -> None:
    report = Report("load", "CPU", [Figure("a", 1.0, 2.0, unit="s")], {"seconds": 3.5})
    path = report.write(tmp_path / "new")
    document = json.loads(path.read_text())
    assert path.name == "load.json"
    assert document["figures"][0]["met"] is True
    assert document["details"] == {"seconds": 3.5}
