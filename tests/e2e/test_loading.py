"""A load that takes long is nobody else's affair."""

import threading
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import Server, serving
from tools.tiny_model.cache import TinyModel

DELAY_S = 2.0


def bystander_gaps_during_a_load(
    server: Server, cold: str, prompt: str
) -> tuple[float, list[float]]:
    """Asks ``cold`` while a stream of another adapter runs: its seconds, the stream's gaps."""
    server.answer("shout", prompt)
    gaps: list[tuple[float, float]] = []
    done = threading.Event()

    def bystander() -> None:
        while not done.is_set():
            stream = server.stream_gaps("shout", prompt, max_tokens=150, ignore_eos=True)
            gaps.extend(stream)

    stream = threading.Thread(target=bystander)
    stream.start()
    begin_s = time.monotonic()
    while not gaps and time.monotonic() < begin_s + 30:
        time.sleep(0.001)
    begin_s = time.monotonic()
    server.answer(cold, prompt)
    end_s = time.monotonic()
    done.set()
    stream.join()
    return end_s - begin_s, [gap for at_s, gap in gaps if begin_s <= at_s <= end_s]


@pytest.mark.e2e
def test_a_load_that_takes_seconds_is_no_gap_in_other_streams(
    tiny_model: TinyModel,
) -> None:
    with serving(*serve_arguments(tiny_model), inject_read_delay_s=DELAY_S) as server:
        seconds, gaps = bystander_gaps_during_a_load(server, "json", tiny_model.prompts[0])
    assert seconds >= DELAY_S, "the load was not delayed: nothing was tested"
    assert len(gaps) > 20 * DELAY_S
    # A stream that waited for the load would show a gap of the whole delay.
    assert max(gaps) < DELAY_S / 5


@pytest.mark.e2e
def test_ten_thousand_adapter_folders_cost_nothing_at_start(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    for number in range(10_000):
        (tmp_path / f"tenant-{number:05}").symlink_to(tiny_model.adapters["shout"])
    roots = ("--adapter-root", str(tiny_model.adapters["shout"].parent))
    begin_s = time.monotonic()
    with serving(str(tiny_model.base), "--device", "cpu", "--port", "0") as server:
        server.http.get("/ready").raise_for_status()
        without_s = time.monotonic() - begin_s
    begin_s = time.monotonic()
    with serving(
        str(tiny_model.base), "--device", "cpu", "--port", "0", "--lora-dir", str(tmp_path), *roots
    ) as server:
        with_s = time.monotonic() - begin_s
        prompt = tiny_model.prompts[7]
        assert server.answer("tenant-09999", prompt) == tiny_model.answers["shout"][7]
        missing = server.complete("tenant-10000", prompt)
        assert missing.status_code == 404, missing.text
        names = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
        assert len(names) == 10_001
    assert with_s < without_s + 2.0
