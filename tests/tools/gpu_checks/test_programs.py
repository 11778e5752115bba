"""Programs that a check runs: their outcome, their time limit, pytest's counts."""

import sys
from pathlib import Path

from engine.config import DeviceKind
from tools.gpu_checks.figures import Report
from tools.gpu_checks.outcomes import count_tests, run_program
from tools.gpu_checks.programs import kernel_tests, run_benchmark, run_tests
from tools.gpu_checks.setting import Setting


def setting(folder: Path) -> Setting:
    return Setting(DeviceKind.CPU, True, folder / "work", folder / "out", 30.0)


def test_a_programs_status_and_output_are_kept() -> None:
    code = "import os; print(os.environ['WORD']); raise SystemExit(3)"
    outcome = run_program([sys.executable, "-c", code], {"WORD": "hello"}, 30.0)
    assert (outcome.status, outcome.output) == (3, "hello\n")


def test_a_program_that_does_not_end_is_killed_with_its_children() -> None:
    # Only when the grandchild is dead as well is the pipe of their output closed.
    code = "import subprocess; subprocess.run(['sleep', '100'])"
    outcome = run_program([sys.executable, "-c", code], {}, 1.0)
    assert outcome.status is None
    assert outcome.seconds < 30


def test_skipped_tests_did_not_run() -> None:
    xml = '<testsuites><testsuite tests="9" skipped="2" failures="1" errors="1"/></testsuites>'
    assert count_tests(xml) == (7, 2)


def test_failures_of_tests_become_a_figure_that_misses_its_goal(tmp_path: Path) -> None:
    tests = tmp_path / "test_two.py"
    tests.write_text("def test_right(): pass\ndef test_wrong(): assert False\n")
    report = Report("kernels", "CPU")
    arguments = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null"]
    run_tests(report, setting(tmp_path), "some tests", [*arguments, str(tests)], {}, 60.0)
    (figure,) = report.figures
    assert (figure.measured, figure.met) == (1, False)
    assert figure.note.startswith("2 ran in")


def test_tests_that_could_not_even_start_count_as_a_failure(tmp_path: Path) -> None:
    report = Report("kernels", "CPU")
    run_tests(report, setting(tmp_path), "none", [str(tmp_path / "no")], {}, 60.0)
    (figure,) = report.figures
    assert figure.met is False


def test_kernels_are_found_by_folder_or_by_name_and_none_twice(tmp_path: Path) -> None:
    names = ("a/kernels/test_kernel_x.py", "b/test_triton_kernels.py", "b/test_other.py")
    for name in (*names, "b/test_triton_linear.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert kernel_tests(tmp_path) == [
        str(tmp_path / "a" / "kernels"),
        str(tmp_path / "b" / "test_triton_kernels.py"),
        str(tmp_path / "b" / "test_triton_linear.py"),
    ]


def test_a_benchmark_that_is_not_there_is_reported_and_not_failed(tmp_path: Path) -> None:
    report = Report("load", "CPU")
    run_benchmark(report, setting(tmp_path), "tools.bench_of_nothing", 1.0)
    (figure,) = report.figures
    assert (figure.met, figure.note) == (None, "not there")
