"""Other programs as parts of a check: tests, benchmarks, a memory checker around tests."""

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.outcomes import count_tests, run_program
from tools.gpu_checks.setting import Setting
from tools.gpu_checks.sharded_tests import ShardedRun, deal, list_tests, run_shards

_SANITIZER_ERROR_STATUS = 86


def gpu_name() -> str:
    """What the driver calls the GPU, without taking a context of it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "CPU"
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return answer.stdout.strip()


def run_tests(
    report: Report,
    setting: Setting,
    name: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    max_seconds: float,
) -> None:
    """Adds how many of pytest's tests failed, goal none, and how many ran."""
    results = setting.out / f"{report.part}-{name.replace(' ', '-')}.xml"
    results.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *arguments]
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
        for name in ("test_*kernel*.py", "test_*triton*.py")
        for path in root.rglob(name)
        if not any(folder in path.parents for folder in folders)
    ]
    return sorted({str(path) for path in (*folders, *files)})


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
    """The loads' benchmarks, then what loads cost everybody else's decode steps."""
    # Imported here alone: it takes an engine, which the other programs' parts do without.
    from tools.gpu_checks.staging import check_staging

    report = Report("load", gpu_name())
    end_s = time.monotonic() + setting.max_seconds
    for module in ("tools.bench_load", "tools.bench_chunks"):
        run_benchmark(report, setting, module, max(1.0, end_s - time.monotonic()))
    check_staging(report, setting)
    return report


def check_memory(setting: Setting) -> Report:
    """The kernels' tests under compute-sanitizer, each with a few of its parametrizations.

    A plain run of the same tests comes first: it compiles all kernels, which takes far longer under
    the checker. Tests that are slow without it are left out.
    """
    report = Report("memcheck", gpu_name())
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        note = "compute-sanitizer is not installed"
        report.figures.append(Figure("memcheck: memory errors", None, 0, note=note))
        return report
    end_s = time.monotonic() + setting.max_seconds
    arguments = ["-m", "not slow and not long", *kernel_tests(Path("tests"))]
    if setting.select is not None:
        arguments += ["-k", setting.select]
    shards = deal(list_tests(arguments))
    environment = {
        "OMP_NUM_THREADS": "1",
        # Without torch's caching, a kernel that reads past a tensor leaves its allocation.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "TRITON_CACHE_DIR": str(setting.work / "triton"),
    }
    wrapper = [checker, "--tool", "memcheck", "--target-processes", "all"]
    wrapper += ["--error-exitcode", str(_SANITIZER_ERROR_STATUS)]
    for name, around in (("plain", []), ("memcheck", wrapper)):
        seconds_left = max(1.0, end_s - time.monotonic())
        done = run_shards(shards, setting.out / name, environment, seconds_left, around)
        report.figures += done.figures(name)
        report.details[name] = _details(done)
    report.figures.append(Figure("memcheck: memory errors", done.num_checker_errors, 0))
    return report


def _details(done: ShardedRun) -> dict[str, object]:
    return {
        "num_listed": done.num_listed,
        "num_reached": done.num_reached,
        "files": {file: asdict(count) for file, count in done.files.items()},
        "outcomes": [asdict(outcome) for outcome in done.outcomes],
    }
