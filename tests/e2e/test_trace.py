"""A served model's trace tells an adapter's way from its file to its first step."""

from pathlib import Path

import pytest

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import serving
from tests.trace_events import read_events
from tools.tiny_model.cache import TinyModel


@pytest.mark.e2e
def test_a_trace_shows_an_adapter_from_its_file_to_its_first_step(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    with serving(*serve_arguments(tiny_model), "--trace", str(path)) as server:
        server.answer("json", tiny_model.prompts[0])
    events = read_events(path)
    name = tiny_model.adapters["json"].name
    ways = [
        next(event for event in events if event["name"] == f"{kind} {name}")
        for kind in ("read", "stage", "copy")
    ]
    steps = [event for event in events if event["ph"] == "X" and event["name"] == "step"]
    ways.append(next(step for step in steps if step["args"]["first_uses"] == name))
    begins = [event["ts"] for event in ways]
    assert begins == sorted(begins)
    ends = [step["ts"] + step["dur"] for step in steps]
    assert all(end <= step["ts"] for end, step in zip(ends, steps[1:], strict=False))
    load = ways[1]["args"]["load"]
    flow = [event["ph"] for event in events if event.get("cat") == "load" and event["id"] == load]
    assert sorted(flow) == ["f", "s", "t"]


@pytest.mark.e2e
def test_a_trace_shows_a_prefill_going_through_the_layers_that_have_arrived(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    pieces = ("--read-block-size", "4KiB", "--staging-chunk-size", "4KiB")
    arguments = (*serve_arguments(tiny_model), "--adapter-loading", "layerwise", *pieces)
    with serving(*arguments, "--trace", str(path), inject_read_delay_s=0.02) as server:
        server.answer("json", tiny_model.prompts[0])
    events = read_events(path)
    name = tiny_model.adapters["json"].name
    copies = [event for event in events if event["name"] == f"copy {name}"]
    groups = [event for event in events if event["name"] == "layers"]
    assert {group["args"]["adapter"] for group in groups} == {name}
    assert groups[0]["ts"] < copies[-1]["ts"]
    bounds = [tuple(map(int, group["args"]["layers"].split("-"))) for group in groups]
    layers = [layer for first, last in bounds for layer in range(first, last + 1)]
    assert len(groups) >= 2 and layers == list(range(len(layers)))
