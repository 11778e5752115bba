"""A program that a check runs: its outcome within a time, and what its tests report."""

import os
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MAX_OUTPUT_CHARS = 6000


@dataclass(frozen=True, slots=True)
class Outcome:
    """``status`` None: the program ran past its time and was killed."""

    status: int | None
    seconds: float
    output: str


def run_program(
    command: Sequence[str], environment: Mapping[str, str], max_seconds: float
) -> Outcome:
    """Runs it with its output collected, and shown as well."""
    print("$", " ".join(command), flush=True)
    begin_s = time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        text=True,
        # Its own group, so that whatever it has started can be ended with it.
        process_group=0,
    ) as process:
        try:
            output, _ = process.communicate(timeout=max_seconds)
            status: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            status = None
    print(output[-_MAX_OUTPUT_CHARS:], flush=True)
    return Outcome(status, time.monotonic() - begin_s, output[-_MAX_OUTPUT_CHARS:])


def count_tests(junit_xml: str) -> tuple[int, int]:
    """Tests that ran, and how many of them failed or broke."""
    suites = list(ElementTree.fromstring(junit_xml).iter("testsuite"))

    def total(attribute: str) -> int:
        return sum(int(suite.get(attribute, "0")) for suite in suites)

    return total("tests") - total("skipped"), total("failures") + total("errors")
