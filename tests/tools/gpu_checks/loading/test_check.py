"""Rows that are chosen, the servers that they share, and the part as a whole with toys."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import DeviceKind
from ipc.errors import InvalidRequest
from tools.gpu_checks.command import main
from tools.gpu_checks.loading import servers as names
from tools.gpu_checks.loading.adapters import AdapterFolders
from tools.gpu_checks.loading.check import (
    Measured,
    chosen_rows,
    figures_of,
    measure_server,
    needed_servers,
)
from tools.gpu_checks.loading.rows import all_rows
from tools.gpu_checks.loading.servers import ServerPlan, all_servers
from tools.gpu_checks.setting import Setting

DEFAULT = names.DEFAULT_MODE.value


@pytest.fixture
def plans(tmp_path: Path) -> list[ServerPlan]:
    """Those of the full size."""
    setting = Setting(DeviceKind.CUDA, False, tmp_path, tmp_path, 1.0)
    return all_servers(setting, AdapterFolders(tmp_path, setting.shape("llama-3.1-8b")))


def test_every_run_that_a_row_needs_is_some_servers(plans: list[ServerPlan]) -> None:
    runs = [(plan.name, load.name) for plan in plans for load in plan.loads]
    assert len(runs) == len(set(runs))
    assert {key for row in all_rows().values() for key in row.needs} == set(runs)


def test_rows_share_a_servers_runs_and_take_no_others(plans: list[ServerPlan]) -> None:
    needed = needed_servers(chosen_rows(("rotating-256", "blocking-vs-default")), plans)
    assert [(plan.name, [load.name for load in plan.loads]) for plan in needed] == [
        (DEFAULT, [names.RESIDENT, names.ROTATING]),
        ("blocking", [names.ROTATING]),
    ]


def test_a_load_that_another_server_has_too_starts_only_those_that_a_row_names(
    plans: list[ServerPlan],
) -> None:
    needed = needed_servers(chosen_rows(("rotating-256",)), plans)
    assert [plan.name for plan in needed] == [DEFAULT]


def test_the_room_of_each_server_is_what_its_row_says(plans: list[ServerPlan]) -> None:
    pools = {plan.name: plan.pool_bytes for plan in plans}
    rank = 81920 * 2 * 32
    assert pools[DEFAULT] == pools[names.TRACED] == pools[names.TRACED_FREE] == 8 * 256 * rank
    # Ranks 32, 16, 8 and 4, the last of them padded to 8, on q, k, v and o.
    total = 250 * (32 + 16 + 8 + 8) * (2 * 8192 + 2 * 5120) * 2 * 32
    assert total <= pools[names.ALL_RESIDENT] < 1.03 * total
    assert pools[names.TENTH] == pytest.approx(total / 10, abs=128)
    group = (3 * 8 + 64) * rank
    assert group <= pools[names.COHORTS] < group + 8 * rank


def test_no_call_of_a_few_rows_exceeds_ten_minutes(plans: list[ServerPlan]) -> None:
    for rows in (
        ("rotating-256", "rotating-16", "cold-warm", "blocking-vs-default"),
        ("pr-workload", "power-law"),
        ("cohorts",),
    ):
        needed = needed_servers(chosen_rows(rows), plans)
        assert sum(plan.expected_s for plan in needed) < 450


def test_without_a_choice_every_row_is_measured() -> None:
    assert [row.name for row in chosen_rows(())] == list(all_rows())


def test_a_row_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^--rows: expected some of rotating-256, .*'none'$"):
        chosen_rows(("cohorts", "none"))


def test_a_row_whose_server_went_wrong_is_told_without_a_number() -> None:
    (row,) = chosen_rows(("power-law",))
    problems = {names.TENTH: "it broke\n  its log", names.ALL_RESIDENT: "so did this"}
    (figure,) = figures_of(row, {}, problems)
    assert (figure.name, figure.measured) == ("power-law", None)
    assert figure.note == "room-for-a-tenth: it broke, room-for-all: so did this"


@pytest.mark.e2e
def test_a_server_that_does_not_start_is_told_with_its_log_and_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting(DeviceKind.CPU, True, tmp_path, tmp_path, 60.0)
    model = setting.shape("toy")
    folders = AdapterFolders(tmp_path / "adapters", model)
    plan = replace(all_servers(setting, folders)[0], options=("--block-size", "-1"))
    (tmp_path / "loading").mkdir()
    measured = Measured()
    measure_server(setting, model, folders, plan, measured)
    assert measured.problems[DEFAULT].startswith("the server ended with status 2")
    assert "--block-size" in capsys.readouterr().out
    assert "--block-size" in (tmp_path / "loading" / f"{DEFAULT}.log").read_text()
    assert measured.outcomes == {}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param("pr-workload", marks=pytest.mark.long),
        pytest.param("cold-warm,cohorts", marks=pytest.mark.long),
        pytest.param("power-law,blocking-vs-default", marks=pytest.mark.long),
    ],
)
def test_with_toys_servers_answer_every_request_of_the_rows(rows: str, tmp_path: Path) -> None:
    arguments = ["--part", "loading", "--rows", rows, "--device", "cpu", "--tiny"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "loading.json").read_text())
    measured = {figure["name"]: figure["measured"] for figure in document["figures"]}
    assert measured["failed requests"] == measured["servers that went wrong"] == 0
    assert None not in measured.values(), measured
    assert {name.partition(":")[0] for name in measured if ":" in name} == set(rows.split(","))


@pytest.mark.e2e
def test_with_toys_rotating_adapters_are_loaded_and_resident_ones_are_not(tmp_path: Path) -> None:
    arguments = ["--part", "loading", "--rows", "rotating-16", "--device", "cpu", "--tiny"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "loading.json").read_text())["details"]["runs"]
    loads = {
        name: runs[f"{DEFAULT}-{name}"]["counters"].get("sidestream:adapter_loads_total", 0)
        for name in (names.RESIDENT_LONG, names.ROTATING_LONG, names.FIRST_TOUCH)
    }
    assert loads[names.RESIDENT_LONG] == 0
    assert loads[names.ROTATING_LONG] > 0
    assert loads[names.FIRST_TOUCH] == 20
