"""Tests divided among several processes, which report what ran file by file."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_checks.figures import Figure
from tools.gpu_checks.outcomes import Outcome, run_program

_PLUGIN = ("-p", "tools.gpu_checks.thinned_tests")
_MAX_SHARDS = 8
# For the test that is running when no further one is begun.
_LAST_TEST_S = 60.0
_CHECKER_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")


@dataclass(frozen=True, slots=True)
class FileCount:
    """Tests of one file: how many ran, and how many of these failed or broke."""

    num_run: int
    num_failed: int


@dataclass(frozen=True, slots=True)
class ShardedRun:
    """All processes' outcomes, and by file what ran; ``num_listed`` tests were to run or skip."""

    num_listed: int
    num_reached: int
    files: Mapping[str, FileCount]
    outcomes: tuple[Outcome, ...]

    @property
    def num_run(self) -> int:
        return sum(count.num_run for count in self.files.values())

    @property
    def num_broken(self) -> int:
        """Processes that ended otherwise than by passing or failing tests."""
        return sum(outcome.status not in (0, 1) for outcome in self.outcomes)

    @property
    def num_checker_errors(self) -> int:
        """What a checker around the processes found."""
        return sum(
            int(found[1])
            for outcome in self.outcomes
            for found in _CHECKER_SUMMARY.finditer(outcome.output)
        )

    @property
    def seconds(self) -> float:
        return max((outcome.seconds for outcome in self.outcomes), default=0.0)

    def figures(self, name: str) -> list[Figure]:
        """Failures file by file, processes that broke, tests that were not reached or did not run.

        All of them must be none, but for the last.
        """
        failures = [
            Figure(f"{name}: failures in {file}", count.num_failed, 0, note=f"{count.num_run} ran")
            for file, count in sorted(self.files.items())
        ]
        return [
            *failures,
            Figure(f"{name}: processes that broke", self.num_broken, 0),
            Figure(f"{name}: tests not reached", self.num_listed - self.num_reached, 0),
            Figure(
                f"{name}: tests that ran",
                self.num_run,
                1,
                at_most=False,
                note=f"in {self.seconds:.0f} s",
            ),
        ]


def list_tests(arguments: Sequence[str]) -> list[str]:
    """Names of the tests that pytest collects for ``arguments``, thinned out.

    Raises:
        CalledProcessError: it could not collect them, or there are none.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *_PLUGIN, "--thin"]
    answer = subprocess.run(
        [*command, *arguments], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    return [line for line in answer.stdout.splitlines() if "::" in line]


def deal(tests: Sequence[str]) -> list[list[str]]:
    """The tests dealt out in turn, to half as many processes as there are cores."""
    num_shards = max(1, min(_MAX_SHARDS, (os.cpu_count() or 1) // 2, len(tests)))
    return [list(tests[number::num_shards]) for number in range(num_shards)]


def run_shards(
    shards: Sequence[Sequence[str]],
    results: Path,
    environment: Mapping[str, str],
    max_seconds: float,
    wrapper: Sequence[str] = (),
) -> ShardedRun:
    """Runs every shard in a process of its own, all at once, with reports in folder ``results``.

    Shortly before ``max_seconds`` no further test is begun; what runs on is killed then.
    """
    results.mkdir(parents=True, exist_ok=True)
    end_after_s = max(1.0, max_seconds - _LAST_TEST_S)
    reports = [results / f"shard-{number}.xml" for number in range(len(shards))]

    def run(report: Path, tests: Sequence[str]) -> Outcome:
        report.unlink(missing_ok=True)
        command = [*wrapper, sys.executable, "-m", "pytest", "-q", *_PLUGIN]
        command += ["--end-after", f"{end_after_s:.0f}", f"--junitxml={report}"]
        command += ["-o", "timeout=0", "-p", "no:cacheprovider", *tests]
        return run_program(command, environment, max_seconds)

    with ThreadPoolExecutor(max(1, len(shards))) as threads:
        outcomes = tuple(threads.map(run, reports, shards))
    cases = [case for report in reports if report.is_file() for case in _cases(report)]
    files: dict[str, FileCount] = {}
    for file, ran, failed in cases:
        before = files.get(file, FileCount(0, 0))
        files[file] = FileCount(before.num_run + ran, before.num_failed + failed)
    return ShardedRun(sum(map(len, shards)), len(cases), files, outcomes)


def _cases(report: Path) -> list[tuple[str, bool, bool]]:
    """Module, whether it ran, whether it failed; of every test that a report names."""
    return [
        (
            case.get("classname", ""),
            case.find("skipped") is None,
            case.find("failure") is not None or case.find("error") is not None,
        )
        for case in ElementTree.parse(report).iter("testcase")
    ]
