"""Other programs as parts of a check: tests, benchmarks, a memory checker around tests."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.setting import Setting

_MAX_OUTPUT_CHARS = 6000
_SANITIZER_ERROR_STATUS = 86


@dataclass(frozen=True, slots=True)
class Outcome:
    """``status`` None: the program ran past its time and was killed."""

    status: int | None
    seconds: float
    output: str


def gpu_name() -> str:
    """What the driver calls the GPU, without taking a context of it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "CPU"
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return answer.stdout.strip()


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


def run_tests(
    report: Report,
    setting: Setting,
    name: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    max_seconds: float,
    wrapper: Sequence[str] = (),
) -> None:
    """Adds how many of pytest's tests failed, goal none, and how many ran."""
    results = setting.out / f"{report.part}-{name.replace(' ', '-')}.xml"
    results.parent.mkdir(parents=True, exist_ok=True)
    command = [*wrapper, sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *arguments]
    outcome = run_program(command, environment, max_seconds)
    num_run, num_failed = count_tests(results.read_text()) if results.is_file() else (0, 0)
    if outcome.status != 0:
        # Also what no test reports: a crash, a time that ran out, an error of the checker.
        num_failed = max(1, num_failed)
    status = "killed: out of time" if outcome.status is None else f"status {outcome.status}"
    report.details[name] = {
        "status": outcome.status,
        "seconds": outcome.seconds,
        "num_run": num_run,
        "output": outcome.output,
    }
    note = f"{num_run} ran in {outcome.seconds:.0f} s" + (f", {status}" if num_failed else "")
    report.figures.append(Figure(f"{name}: failures", num_failed, 0, note=note))


def count_tests(junit_xml: str) -> tuple[int, int]:
    """Tests that ran, and how many of them failed or broke."""
    suites = list(ElementTree.fromstring(junit_xml).iter("testsuite"))

    def total(attribute: str) -> int:
        return sum(int(suite.get(attribute, "0")) for suite in suites)

    return total("tests") - total("skipped"), total("failures") + total("errors")


def run_benchmark(report: Report, setting: Setting, module: str, max_seconds: float) -> None:
    """Runs ``python -m MODULE --out FILE``; what it wrote lies beside the report."""
    name = module.rpartition(".")[2]
    if importlib.util.find_spec(module) is None:
        report.figures.append(Figure(f"{name}: status", None, 0, note="not there"))
        return
    written = setting.out / f"{name}.json"
    written.parent.mkdir(parents=True, exist_ok=True)
    outcome = run_program([sys.executable, "-m", module, "--out", str(written)], {}, max_seconds)
    report.details[name] = {
        "status": outcome.status,
        "seconds": outcome.seconds,
        "output": outcome.output,
    }
    status = 99.0 if outcome.status is None else float(outcome.status)
    note = f"{outcome.seconds:.0f} s, see {written.name}"
    report.figures.append(Figure(f"{name}: status", status, 0, note=note))


def kernel_tests(root: Path) -> list[str]:
    """Folders and files under ``root`` that test kernels: they use the GPU without being marked."""
    folders = [path for path in root.rglob("kernels") if path.is_dir()]
    files = [
        path
        for path in root.rglob("test_*kernel*.py")
        if not any(folder in path.parents for folder in folders)
    ]
    return sorted(str(path) for path in (*folders, *files))


def check_kernels(setting: Setting) -> Report:
    """The kernels' tests, every other test that needs a GPU, then the kernels' benchmarks."""
    report = Report("kernels", gpu_name())
    kernels = kernel_tests(Path("tests"))
    others = ["-m", "gpu and not e2e", "tests", *(f"--ignore={path}" for path in kernels)]
    end_s = time.monotonic() + setting.max_seconds

    def seconds_left() -> float:
        return max(1.0, end_s - time.monotonic())

    run_tests(report, setting, "kernel tests", kernels, {}, seconds_left())
    run_tests(report, setting, "other gpu tests", others, {}, seconds_left())
    for module in ("tools.bench_lora_kernels", "tools.bench_attention"):
        run_benchmark(report, setting, module, seconds_left())
    return report


def check_load(setting: Setting) -> Report:
    """The loads' benchmark."""
    report = Report("load", gpu_name())
    run_benchmark(report, setting, "tools.bench_load", setting.max_seconds)
    return report


def check_memory(setting: Setting) -> Report:
    """The kernels' tests under compute-sanitizer, those that are slow without it left out."""
    report = Report("memcheck", gpu_name())
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        note = "compute-sanitizer is not installed"
        report.figures.append(Figure("memcheck: failures", None, 0, note=note))
        return report
    wrapper = [checker, "--tool", "memcheck", "--target-processes", "all"]
    wrapper += ["--error-exitcode", str(_SANITIZER_ERROR_STATUS)]
    # Without torch's caching, a kernel that reads past a tensor leaves its allocation.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    arguments = ["-m", "not slow and not long", "-o", "timeout=0", *kernel_tests(Path("tests"))]
    if setting.select is not None:
        arguments += ["-k", setting.select]
    run_tests(report, setting, "memcheck", arguments, environment, setting.max_seconds, wrapper)
    return report
