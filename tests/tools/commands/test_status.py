"""``sidestream status``: what a server's own figures become."""

from collections.abc import Iterator

import msgspec
import pytest
from rich.console import Console

from tests.tools.fake_server import ADAPTERS, MODELS, FakeServer, serving
from tools.cli import main
from tools.commands.status import bar, watch
from tools.http_client import HttpClient

FIGURES = """\
sidestream:engine_up{model_name="tiny"} 1.0
sidestream:engine_epoch{model_name="tiny"} 2.0
sidestream:loader_up{model_name="tiny"} 1.0
vllm:num_requests_running{model_name="tiny"} 3.0
vllm:num_requests_waiting{model_name="tiny"} 2.0
sidestream:num_requests_waiting_for_adapter{model_name="tiny"} 1.0
vllm:kv_cache_usage_perc{model_name="tiny"} 0.5
sidestream:pool_bytes{model_name="tiny"} 4e+09
sidestream:pool_bytes_used{model_name="tiny"} 1e+09
sidestream:adapter_loads_total{model_name="tiny"} LOADS
sidestream:adapter_load_ends_total{model_name="tiny",outcome="failed"} 1.0
sidestream:adapter_load_ends_total{model_name="tiny",outcome="placed"} 4.0
sidestream:adapter_evictions_total{model_name="tiny"} 7.0
vllm:lora_adapter_load_seconds_sum{model_name="tiny"} SECONDS
"""


def figures(loads: int = 4, seconds: float = 1.0) -> tuple[int, str]:
    return 200, FIGURES.replace("LOADS", str(loads)).replace("SECONDS", str(seconds))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as server:
        server.answers = {
            "/version": (200, '{"version": "9.9"}'),
            "/ready": (200, '{"ready": true, "reason": null}'),
            "/metrics": figures(),
            "/v1/models": (200, MODELS),
            "/v1/adapters": (200, ADAPTERS),
        }
        yield server


def test_the_screen_tells_processes_memory_adapters_and_loads(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["/metrics"] = figures()
    assert main(["status", "--url", server.url]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        f"server {server.url}, version 9.9, ready",
        "processes api up, engine up (start 2), loader up",
        "model tiny",
        "requests 3 running, 2 waiting, 1 of them for their adapter",
        "KV cache ############------------ 50%",
        "pool ######------------------ 25% 1.0 GB of 4.0 GB",
        "adapters 2: 1 gpu, 0 loading, 0 host, 1 disk; 1 pinned",
        "loads 4 done, 250 ms each on average; 1 failed, 7 evictions",
    ]


def test_a_server_that_is_not_ready_says_why_and_fails_the_command(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["/ready"] = (503, '{"ready": false, "reason": "the engine is away"}')
    server.answers["/metrics"] = (200, 'sidestream:engine_up{model_name="tiny"} 0.0\n')
    assert main(["status", "--url", server.url]) == 1
    out = capsys.readouterr().out
    assert "not ready: the engine is away" in out
    assert "api up, engine away, loader away" in out
    assert "pool" not in out


def test_programs_get_the_same_as_json(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--json", "--url", server.url]) == 0
    document = msgspec.json.decode(capsys.readouterr().out)
    assert document["adapters"] == {"gpu": 1, "loading": 0, "host": 0, "disk": 1}
    assert document["pool"] == {"used": 10**9, "total": 4 * 10**9}
    assert document["host_tier"] is None


def test_watching_tells_what_the_loads_since_the_last_screen_took(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(seconds: float) -> None:
        if server.answers["/metrics"] == figures(6, 3.0):
            raise KeyboardInterrupt
        server.answers["/metrics"] = figures(6, 3.0)

    with pytest.raises(KeyboardInterrupt):
        watch(HttpClient(server.url, 10.0), 1.0, Console(width=200), wait)
    loads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loads")]
    assert "just now" not in loads[0]
    assert "6 done, 500 ms each on average; just now 2, 1000 ms each on average" in loads[1]


def test_a_server_that_goes_away_is_watched_until_it_is_back(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    version = server.answers["/version"]
    server.answers["/version"] = (503, "")

    def wait(seconds: float) -> None:
        if server.answers["/version"] == version:
            raise KeyboardInterrupt
        server.answers["/version"] = version

    with pytest.raises(KeyboardInterrupt):
        watch(HttpClient(server.url, 10.0), 1.0, Console(width=200), wait)
    out = capsys.readouterr().out
    assert out.startswith("away: the server answered with status 503\n")
    assert "version 9.9, ready" in out


@pytest.mark.parametrize(("share", "num_full"), [(0.0, 0), (0.5, 12), (1.0, 24), (1.5, 24)])
def test_a_bar_never_outgrows_its_width(share: float, num_full: int) -> None:
    drawn = bar(share)
    assert (drawn.count("#"), drawn.count("-")) == (num_full, 24 - num_full)
