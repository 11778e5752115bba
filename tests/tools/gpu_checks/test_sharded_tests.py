"""Fewer tests, in several processes: which ones, and what is known of them afterwards."""

import itertools
from pathlib import Path

import pytest

from tools.gpu_checks.outcomes import Outcome
from tools.gpu_checks.sharded_tests import FileCount, ShardedRun, deal, list_tests, run_shards
from tools.gpu_checks.thinned_tests import covering

TESTS = """
import time

import pytest


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (1, 3), (2, 3)])
@pytest.mark.parametrize("dtype", ["half", "full"])
def test_sizes(rows, width, dtype):
    assert (rows, width, dtype) != (1, 3, "full")


def test_once():
    pass


@pytest.mark.skip(reason="no GPU")
def test_skipped():
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("def test_it():\n    pass\n")
    return tmp_path


def arguments(folder: Path) -> list[str]:
    return ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(folder), str(folder)]


def test_every_value_occurs_and_values_meet_in_different_pairs() -> None:
    choices = [{"rank": rank, "dtype": dtype} for rank, dtype in itertools.product(range(6), "abc")]
    chosen = [choices[index] for index in covering(choices)]
    assert [choice["rank"] for choice in chosen] == list(range(6))
    dtypes = [choice["dtype"] for choice in chosen]
    assert [dtypes.count(dtype) for dtype in "abc"] == [2, 2, 2]


def test_values_of_parameters_with_as_many_values_do_not_always_meet_the_same() -> None:
    choices = [
        {"rank": rank, "dtype": dtype, "norms": norms}
        for rank, dtype, norms in itertools.product(range(4), "ab", (False, True))
    ]
    chosen = [choices[index] for index in covering(choices)]
    assert {(choice["dtype"], choice["norms"]) for choice in chosen} == {
        ("a", False),
        ("a", True),
        ("b", False),
        ("b", True),
    }


def test_a_test_without_parameters_is_kept_once() -> None:
    assert covering([{}]) == [0]
    assert covering([]) == []


def test_listed_tests_have_every_value_of_their_parameters(folder: Path) -> None:
    tests = [name.rpartition("::")[2] for name in list_tests(arguments(folder))]
    assert tests == [
        "test_it",
        "test_sizes[half-1-2]",
        "test_sizes[half-2-3]",
        "test_sizes[full-1-3]",
        "test_once",
        "test_skipped",
    ]


def test_shards_have_every_test_once() -> None:
    tests = [str(number) for number in range(21)]
    assert sorted(itertools.chain(*deal(tests))) == sorted(tests)
    assert deal([]) == [[]]


def test_what_ran_in_all_processes_is_counted_by_file(folder: Path) -> None:
    listed = [f"{folder}/{name}" for name in ("test_some.py", "test_other.py")]
    shards = [[listed[0], *arguments(folder)[:-1]], [listed[1], *arguments(folder)[:-1]]]
    done = run_shards(shards, folder / "results", {}, 120.0)
    assert done.files == {"test_some": FileCount(7, 1), "test_other": FileCount(1, 0)}
    assert (done.num_run, done.num_reached, done.num_broken) == (8, 9, 0)


def test_no_test_is_begun_after_the_time_and_the_others_are_reported(folder: Path) -> None:
    # A second for the tests, which is over before the first one has ended.
    slow = "import pytest\n\n@pytest.mark.parametrize('n', range(3))\ndef test_busy(n):\n"
    slow += "    import time\n    end = time.monotonic() + 1.1\n"
    slow += "    while time.monotonic() < end:\n        pass\n"
    (folder / "test_slow.py").write_text(slow)
    tests = [f"{folder}/test_slow.py::test_busy[{number}]" for number in range(3)]
    done = run_shards([[*arguments(folder)[:-1], *tests]], folder / "results", {}, 61.0)
    assert done.files == {"test_slow": FileCount(1, 0)}
    assert done.num_reached == 1


def run_of(files: dict[str, FileCount], *outcomes: Outcome, num_listed: int = 2) -> ShardedRun:
    return ShardedRun(num_listed, num_listed, files, outcomes)


def test_a_run_of_no_test_misses_its_goal() -> None:
    met = [figure.met for figure in run_of({}, Outcome(0, 1.0, ""), num_listed=0).figures("it")]
    assert met == [True, True, False]


def test_a_process_that_broke_and_what_a_checker_found_are_counted() -> None:
    done = run_of(
        {"a": FileCount(2, 0)},
        Outcome(86, 1.0, "========= ERROR SUMMARY: 3 errors"),
        Outcome(None, 1.0, ""),
        Outcome(1, 1.0, "========= ERROR SUMMARY: 0 errors"),
    )
    assert (done.num_broken, done.num_checker_errors) == (2, 3)
    assert [figure.met for figure in done.figures("it")] == [True, False, True, True]
