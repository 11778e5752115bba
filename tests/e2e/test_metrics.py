"""A whole server counts what really happens, once."""

import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import Server, serving, wait_until
from tools.tiny_model.cache import TinyModel

PHASES = ("queue", "read", "dequantize", "h2d", "place")


class Figures:
    """One scrape, by the names of samples and by one label's value."""

    def __init__(self, server: Server) -> None:
        text = server.http.get("/metrics").raise_for_status().text
        self._samples = [
            s for family in text_string_to_metric_families(text) for s in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        found = [
            s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()
        ]
        assert found, f"no sample {name} {labels}"
        return sum(found)

    def phase(self, name: str, part: str) -> float:
        return self.value(f"sidestream:adapter_load_phase_seconds_{part}", phase=name)

    @property
    def counters(self) -> dict[Any, float]:
        return {
            (s.name, *sorted(s.labels.items())): s.value
            for s in self._samples
            if s.name.endswith(("_total", "_count", "_bucket"))
        }


def sent(server: Server, num_loads: int) -> Figures:
    """The figures once the loader has told of so many loads; a load is served a little before."""
    wait_until(
        lambda: Figures(server).phase("h2d", "count") == num_loads, f"{num_loads} loads are told"
    )
    return Figures(server)


@pytest.mark.e2e
def test_a_load_is_counted_once_in_each_of_its_phases(tiny_model: TinyModel) -> None:
    prompt = tiny_model.prompts[0]
    began_s = time.monotonic()
    with serving(*serve_arguments(tiny_model)) as server:
        server.answer("tiny", prompt)
        assert [Figures(server).phase(phase, "count") for phase in PHASES] == [0] * 5
        server.answer("shout", prompt)
        server.answer("shout", prompt)
        first = sent(server, 1)
        for phase in PHASES:
            assert first.phase(phase, "count") == 1, phase
            assert 0.0 < first.phase(phase, "sum") < time.monotonic() - began_s, phase
        assert first.value("vllm:lora_adapter_load_seconds_count") == 1
        assert first.value("sidestream:adapter_load_ends_total", outcome="placed") == 1
        assert first.value("sidestream:adapter_hits_total", tier="disk") == 1
        assert first.value("sidestream:adapter_hits_total", tier="gpu") == 1
        assert first.value("sidestream:adapter_bytes_read_total") > 0
        size = first.value("sidestream:adapter_bytes_loaded_total")
        assert first.value("sidestream:adapter_bytes_copied_total", source="disk") == size
        assert first.value("sidestream:pool_bytes_used") >= size
        assert first.value("sidestream:host_tier_bytes_used") == size

        # Room for two: the third takes the first one's, which then comes back from host memory.
        for name in ("json", "pirate", "shout"):
            server.answer(name, prompt)
        last = sent(server, 4)
        assert last.phase("read", "count") == 3
        assert last.phase("place", "count") == 4
        assert last.value("sidestream:adapter_hits_total", tier="host") == 1
        assert last.value("sidestream:adapter_misses_total") == 4
        assert last.value("sidestream:adapter_bytes_copied_total", source="host") == size
        assert last.value("sidestream:adapter_evictions_total") == 2
        assert last.value("sidestream:steps_total", kind="decode") > 0
        seconds = time.monotonic() - began_s
        assert 0.0 < last.value("sidestream:forward_busy_seconds_total") < seconds


@pytest.mark.e2e
def test_counters_outlive_the_loader_and_begin_anew_with_the_engine(tiny_model: TinyModel) -> None:
    prompt = tiny_model.prompts[0]
    with serving(*serve_arguments(tiny_model)) as server:
        server.answer("shout", prompt)
        before = sent(server, 1).counters
        server.kill("loader")
        wait_until(
            lambda: Figures(server).value("sidestream:loader_connections_total") == 2,
            "the next loader is connected",
        )
        assert Figures(server).value("sidestream:loader_epoch") == 2
        server.answer("json", prompt)
        after = sent(server, 2).counters
        assert all(after[series] >= value for series, value in before.items())

        answered = Figures(server).value("vllm:request_success_total")
        server.kill("engine")
        wait_until(
            lambda: (
                "sidestream:engine_epoch" in server.http.get("/metrics").text
                and Figures(server).value("sidestream:engine_epoch") == 2
            ),
            "the next engine answers",
        )
        anew = Figures(server)
        assert anew.value("vllm:generation_tokens_total") == 0
        assert anew.phase("place", "count") == 0
        assert anew.value("vllm:request_success_total") == answered
