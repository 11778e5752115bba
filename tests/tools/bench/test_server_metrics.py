"""What a server's metrics tell."""

import asyncio

import pytest

from tests.tools.bench.scripted_server import ScriptedServer, run
from tools.bench.server_metrics import ServerWatch, adapter_levels, counters

EXPOSITION = """# HELP sidestream:adapter_loads_total Loads done.
# TYPE sidestream:adapter_loads_total counter
sidestream:adapter_loads_total{{model_name="tiny"}} {loads}
sidestream:adapter_evictions_total{{model_name="tiny"}} 2.0
vllm:lora_adapter_load_seconds_count{{model_name="tiny"}} 3.0
vllm:lora_adapter_load_seconds_sum{{model_name="tiny"}} 0.25
vllm:request_success_total{{finished_reason="stop",model_name="tiny"}} 4.0
vllm:request_success_total{{finished_reason="length",model_name="a{{}} b"}} 1e+01
vllm:request_success_created{{model_name="tiny"}} 1.7e+09
vllm:num_requests_running{{model_name="tiny"}} 1.0
plain_total 7
vllm:lora_adapter_loaded{{adapter_name="shout",level="gpu",pinned="true"}} 1.0
vllm:lora_adapter_loaded{{adapter_name="a \\"b\\"",level="host",pinned="false"}} 1.0
"""


def exposition(loads: int) -> str:
    return EXPOSITION.format(loads=float(loads))


def test_counters_are_summed_over_their_labels() -> None:
    assert counters(exposition(5)) == {
        "sidestream:adapter_loads_total": 5.0,
        "sidestream:adapter_evictions_total": 2.0,
        "vllm:lora_adapter_load_seconds_count": 3.0,
        "vllm:lora_adapter_load_seconds_sum": 0.25,
        "vllm:request_success_total": 14.0,
        "plain_total": 7.0,
    }


def test_levels_are_those_of_adapters_in_memory() -> None:
    assert adapter_levels(exposition(5)) == {"shout": "gpu", 'a \\"b\\"': "host"}


def test_a_watch_tells_what_has_changed_and_follows_the_loads() -> None:
    async def test() -> None:
        async with ScriptedServer() as server:
            server.pages["/metrics"] = (200, exposition(5))
            watch = ServerWatch(server.address)
            await watch.start()
            assert watch.level("shout") == "gpu"
            assert watch.level("somebody") == "disk"
            assert watch.level(None) is None
            server.pages["/metrics"] = (200, exposition(9))
            while watch.polls[-1][1] == 5:
                await asyncio.sleep(0.01)
            assert await watch.stop() == {"sidestream:adapter_loads_total": 4.0}
        assert [loads for _, loads, _ in watch.polls][-1] == 9
        times_s = [at_s for at_s, _, _ in watch.polls]
        assert times_s == sorted(times_s)

    run(test())


def test_polls_go_on_after_a_moment_without_an_engine() -> None:
    async def test() -> None:
        async with ScriptedServer() as server:
            server.pages["/metrics"] = (200, exposition(5))
            watch = ServerWatch(server.address)
            await watch.start()
            server.pages["/metrics"] = (200, "sidestream:engine_up 0.0\n")
            num_asked = len(server.asked)
            while len(server.asked) < num_asked + 2:
                await asyncio.sleep(0.01)
            server.pages["/metrics"] = (200, exposition(6))
            while watch.polls[-1][1] == 5:
                await asyncio.sleep(0.01)
            await watch.stop()

    run(test())


@pytest.mark.parametrize("page", [None, (200, "vllm:generation_tokens_total 3\n")])
def test_a_server_that_counts_no_loads_is_not_polled(page: tuple[int, str] | None) -> None:
    async def test() -> None:
        async with ScriptedServer() as server:
            if page is not None:
                server.pages["/metrics"] = page
            watch = ServerWatch(server.address)
            await watch.start()
            assert watch.level("shout") is None
            assert await watch.stop() == {}
        assert watch.polls == []
        assert len(server.asked) == 2

    run(test())
