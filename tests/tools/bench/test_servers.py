"""Servers that are started to be measured."""

from pathlib import Path

import pytest

from ipc.errors import InvalidRequest, Unavailable
from tools.bench.servers import Target, parse_target, reachable
from tools.shapes import write_model

START_TIMEOUT_S = 60.0


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("a=http://x:1", Target("a", "http://x:1")),
        ("a=https://x/y=z", Target("a", "https://x/y=z")),
        (" a = /model --lora x=/y ", Target("a", None, ("/model", "--lora", "x=/y"))),
        ("a='/my model' --lora 'x=/y z'", Target("a", None, ("/my model", "--lora", "x=/y z"))),
    ],
)
def test_a_target_is_read_from_its_text(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["a", "a=", "=http://x", ""])
def test_what_is_no_target_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^expected NAME=URL or NAME='options of serve', got"):
        parse_target(text)


def test_a_server_that_runs_is_left_running() -> None:
    with reachable(Target("a", "http://nowhere:1"), START_TIMEOUT_S) as url:
        assert url == "http://nowhere:1"


@pytest.mark.e2e
def test_a_server_that_can_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    # Without weights, and without being told to draw some.
    model = write_model(tmp_path / "model", "toy")
    target = Target("a", None, (str(model), "--device", "cpu"))
    with pytest.raises(Unavailable) as caught, reachable(target, START_TIMEOUT_S):
        pass
    first, *log = caught.value.message.splitlines()
    assert first == "the server ended with status 1"
    assert any("safetensors" in line for line in log)
