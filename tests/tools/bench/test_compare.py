"""Two real servers of the tiny model, one after the other."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.e2e.conftest import DEVICE, POOL_FOR_TWO
from tests.e2e.harness import DEADLINE_S, wait_until
from tools.bench.records import Measurement, RequestKind, RequestRecord, Results
from tools.cli import main
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


def serve_options(tiny_model: TinyModel, *more: str) -> str:
    """For one of the servers; its four adapters fit unless ``more`` says otherwise."""
    options = [str(tiny_model.base), "--device", DEVICE, "--dtype", "float32"]
    options += ["--served-model-name", "tiny", "--kv-cache-memory", "64MiB", *more]
    for name, path in tiny_model.adapters.items():
        options += ["--lora", f"{name}={path}"]
    return shlex.join(options)


@pytest.fixture
def one_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.long
@pytest.mark.usefixtures("one_core_each")
def test_a_server_with_room_and_one_without_are_compared(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plots = tmp_path / "out.json", tmp_path / "plots"
    command = ["bench", "rank-16-rotating", "--adapters", "4", "--requests", "24", "--rate", "20"]
    command += ["--input-tokens", "24", "--output-tokens", "4", "--bystanders", "1"]
    command += ["--bystander-output-tokens", "300", "--limit-ttft", "10"]
    command += ["--compare", f"roomy={serve_options(tiny_model)}"]
    tight = serve_options(tiny_model, "--max-adapter-memory", POOL_FOR_TWO)
    command += ["--compare", f"tight={tight}", "--out", str(out), "--plots", str(plots)]
    assert main(command) == 0
    shown = capsys.readouterr().out

    results = msgspec.json.decode(out.read_bytes(), type=Results)
    assert results.failures == {}
    roomy, tight_one = results.measurements
    assert (roomy.name, tight_one.name) == ("roomy", "tight")
    for done in results.measurements:
        check_requests(done)
    loads = "sidestream:adapter_loads_total"
    assert loads not in roomy.run.counters
    assert {record.level for record in planned(roomy)} == {"gpu"}
    assert tight_one.run.counters[loads] > 0
    assert tight_one.run.counters["sidestream:adapter_evictions_total"] > 0
    assert "host" in {record.level for record in planned(tight_one)}
    assert tight_one.run.polls[-1].adapter_loads - tight_one.run.polls[0].adapter_loads > 0

    header = next(line for line in shown.splitlines() if "roomy" in line)
    assert header.split() == ["roomy", "tight"]
    assert "TTFT p50, ms" in shown and "(×" in shown and loads in shown
    assert sorted(path.name for path in plots.iterdir()) == ["bystanders.png", "latency.png"]

    # What was written tells the same again.
    assert main(["bench", "--show", str(out), "--limit-ttft", "10"]) == 0
    assert capsys.readouterr().out == shown[: shown.index("drawn: ")]


def planned(done: Measurement) -> list[RequestRecord]:
    return [record for record in done.run.requests if record.kind is RequestKind.PLANNED]


def check_requests(done: Measurement) -> None:
    """Everything was answered, token by token."""
    records = planned(done)
    assert [record.number for record in records] == list(range(24))
    assert [record.adapter for record in records] == ["json", "pirate", "reverse", "shout"] * 6
    for record in records:
        assert (record.failure, record.num_tokens) == (None, 4)
        assert (record.prompt_tokens, record.cached_tokens) == (24, 0)
    beside = [record for record in done.run.requests if record.kind is RequestKind.BYSTANDER]
    assert beside[-1].was_stopped
    assert all(record.failure is None for record in beside)
    assert sum(len(record.offsets_us) for record in beside) > 20


def test_a_bench_that_is_killed_leaves_no_server(tiny_model: TinyModel, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.cli", "bench", "overlap", "--adapters", "4"]
    command += ["--requests", "100000", "--input-tokens", "8", "--output-tokens", "8"]
    command += ["--compare", f"one={serve_options(tiny_model)}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(tmp_path)}
    bench = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        # The supervisor and its three children.
        wait_until(lambda: len(descendants(bench)) == 4, "the server has all its processes")
        started = descendants(bench)
        bench.send_signal(signal.SIGKILL)
        bench.wait(DEADLINE_S)
        _, alive = psutil.wait_procs(started, timeout=DEADLINE_S)
        assert not alive
        assert list(tmp_path.iterdir()) == []
    finally:
        for process in descendants(bench):
            process.kill()
        bench.kill()
        bench.wait()


def descendants(bench: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(bench.pid).children(recursive=True)
    return []
