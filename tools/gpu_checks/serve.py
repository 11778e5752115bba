"""The whole server on the device: its end-to-end tests, and a loader that is killed."""

import time

from engine.config import DeviceKind
from tests.e2e.harness import Server, serving
from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.programs import gpu_name, run_tests
from tools.gpu_checks.setting import Setting
from tools.shapes import link_adapters, write_adapter

NUM_KILLS = 3
GOAL_S = 5.0


def check_serve(setting: Setting) -> Report:
    """End-to-end tests with the tiny model, then SIGKILLs of the loader beside the full shape."""
    report = Report("serve", gpu_name())
    report.figures += _measure_recovery(setting, report)
    run_tests(
        report,
        setting,
        "e2e tests",
        ["-m", "e2e and not long", "tests/e2e"],
        {"SIDESTREAM_TEST_DEVICE": setting.device.value},
        setting.max_seconds * 0.6,
    )
    return report


def _measure_recovery(setting: Setting, report: Report) -> list[Figure]:
    """From SIGKILL of the loader to the answer of a request whose adapter had to be loaded."""
    model = setting.shape("llama-3.1-8b")
    source = write_adapter(setting.work / "source", model, 16)
    names = [f"adapter-{number}" for number in range(NUM_KILLS + 1)]
    folders = link_adapters(source, setting.work / "adapters", names)
    arguments = [str(model), "--load-format", "dummy", "--device", setting.device.value]
    arguments += ["--served-model-name", "base", "--port", "0"]
    for folder in folders:
        arguments += ["--lora", f"{folder.name}={folder}"]
    arguments += ["--max-model-len", "1024", "--dtype", "bfloat16", "--max-num-seqs", "32"]
    if setting.device is DeviceKind.CUDA:
        arguments += ["--max-adapter-memory", "2GiB", "--host-tier-memory", "4GiB"]
    begin_s = time.monotonic()
    with serving(*arguments) as server:
        start_s = time.monotonic() - begin_s
        _ask(server, names[0])
        samples = []
        for name in names[1:]:
            server.kill("loader")
            begin_s = time.monotonic()
            _ask(server, name)
            samples.append(time.monotonic() - begin_s)
    report.details["recovery_s"] = samples
    return [
        Figure("server start, dummy weights", start_s, unit="s"),
        Figure("SIGKILL of the loader to the next load's answer", max(samples), GOAL_S, unit="s"),
    ]


def _ask(server: Server, adapter: str) -> None:
    body = {"model": adapter, "prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0}
    server.http.post("/v1/completions", json=body).raise_for_status()
