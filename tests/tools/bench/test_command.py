"""``sidestream bench`` as a whole."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tools.bench.records import WORKLOAD, measurement, planned, run_of
from tests.tools.bench.scripted_server import Answer, ScriptedServer, refuse, whole_answer
from tools.bench.records import Results
from tools.cli import main
from tools.serve import reserve_port

MODELS = (
    '{"data": [{"id": "base", "parent": null}, {"id": "lora-1", "parent": "base"},'
    ' {"id": "lora-0", "parent": "base"}, {"id": "other", "parent": "base"}]}'
)


@contextmanager
def serving(answer: Answer = whole_answer, models: str = MODELS) -> Iterator[ScriptedServer]:
    """A scripted server on a thread of its own, as the command keeps this one busy."""
    loop = asyncio.new_event_loop()
    server = ScriptedServer(answer)
    server.pages["/v1/models"] = (200, models)
    loop.run_until_complete(server.__aenter__())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def bench(server: ScriptedServer, *arguments: str | Path) -> int:
    small = ["--rate", "50", "--input-tokens", "8", "--output-tokens", "3", "--adapters", "2"]
    command = ["bench", "overlap", *small, "--requests", "6", "--url", server.url]
    return main([*command, *map(str, arguments)])


def test_a_run_is_warmed_up_measured_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    with serving() as server:
        assert bench(server, "--out", out, "--adapter-pattern", "lora-*") == 0
    bodies = server.bodies("/v1/completions")
    # One to see whether token ids are taken, one to the base model, 16 at once, six measured.
    assert len(bodies) == 1 + 1 + 16 + 6
    assert [body["model"] for body in bodies[:2]] == ["base", "base"]
    assert {body["model"] for body in bodies[-6:]} == {"lora-0", "lora-1"}
    (done,) = msgspec.json.decode(out.read_bytes(), type=Results).measurements
    assert (done.name, done.source, done.base_model) == (server.url, server.url, "base")
    assert [record.adapter for record in done.run.requests] == ["lora-0", "lora-1"] * 3
    assert "requests: 6 of 6 completed" in capsys.readouterr().out


def test_without_a_warm_up_the_first_request_is_measured() -> None:
    with serving() as server:
        assert bench(server, "--warm-up", "none", "--prompts", "tokens") == 0
    assert len(server.bodies("/v1/completions")) == 6


def test_text_is_sent_where_token_ids_are_refused() -> None:
    async def text_alone(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if isinstance(body["prompt"], list):
            refuse(writer, 422, '{"error": {"message": "prompt: expected a string"}}')
        else:
            await whole_answer(body, writer)

    with serving(text_alone) as server:
        assert bench(server) == 0
    prompts = [body["prompt"] for body in server.bodies("/v1/completions")]
    assert isinstance(prompts[0], list)
    assert {len(prompt.split()) for prompt in prompts[2:]} == {8}


def test_failed_requests_are_shown_and_make_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    async def half(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if body["model"] == "lora-0":
            refuse(writer, 503, "busy")
        else:
            await whole_answer(body, writer)

    with serving(half) as server:
        assert bench(server, "--warm-up", "none") == 1
    assert "3 × status 503 (requests)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "models", "message"),
    [
        (
            ["--adapter-pattern", "lora-0"],
            MODELS,
            "the workload asks for 2 adapters, but URL lists 1 of the pattern lora-0",
        ),
        ([], '{"data": [{"id": "a", "parent": "b"}]}', "URL/v1/models: expected a base model, got"),
        ([], "[]", "URL/v1/models: expected a list of models: Expected `object`, got `array`"),
    ],
)
def test_a_server_that_does_not_fit_is_told_and_makes_status_1(
    arguments: list[str], models: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(models=models) as server:
        assert bench(server, *arguments) == 1
    assert f"{server.url}: {message.replace('URL', server.url)}" in capsys.readouterr().out


def test_a_warm_up_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    async def base_alone(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if body["model"] == "base":
            await whole_answer(body, writer)
        else:
            refuse(writer, 422, '{"error": {"message": "rank 96 is too high"}}')

    with serving(base_alone) as server:
        assert bench(server) == 1
    shown = capsys.readouterr().out
    assert "warming up: adapter lora-0: status 422: rank 96 is too high" in shown


def test_no_server_is_told_and_the_others_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with reserve_port("127.0.0.1", 0) as port, serving() as server:
        command = ["bench", "overlap", "--requests", "2", "--rate", "50", "--adapters", "2"]
        command += ["--output-tokens", "3", "--compare", f"gone=http://127.0.0.1:{port}"]
        assert main([*command, "--compare", f"here={server.url}"]) == 1
    shown = capsys.readouterr().out
    assert f"gone: http://127.0.0.1:{port}/v1/models: connect: " in shown
    assert "requests: 2 of 2 completed" in shown


def test_adapters_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tools.shapes import write_model

    model = str(write_model(tmp_path / "model", "toy"))
    folder = str(tmp_path / "adapters")
    assert main(["bench", "--make-adapters", "8:3", folder, "--model", model]) == 0
    shown = capsys.readouterr().out
    assert shown == f"3 adapters in {folder}, from lora-000-r8 to lora-002-r8\n"


def write(path: Path, name: str, **fields: Any) -> Path:
    done = measurement(name, run_of(planned(0, 0.0, [100.0])), **fields)
    path.write_bytes(msgspec.json.encode(Results(measurements=[done])))
    return path


def test_files_are_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write(tmp_path / f"{name}.json", name) for name in ("one", "two")]
    assert main(["bench", "--show", *map(str, paths), "--plots", str(tmp_path / "plots")]) == 0
    header = capsys.readouterr().out.splitlines()[1]
    assert header.split() == ["one", "two"]
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["latency.png"]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("one", {}, "--show: one comes twice"),
        (
            "two",
            {"workload": msgspec.structs.replace(WORKLOAD, rate=None)},
            "--show: two was measured with another workload or seed than one",
        ),
        ("two", {"seed": 1}, "--show: two was measured with another workload or seed than one"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    fields: dict[str, Any],
    message: str,
) -> None:
    first, second = write(tmp_path / "1", "one"), write(tmp_path / "2", name, **fields)
    assert main(["bench", "--show", str(first), str(second)]) == 1
    assert capsys.readouterr().err == f"sidestream: {message}\n"


def test_files_of_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("{}")
    assert main(["bench", "--show", str(tmp_path / "x")]) == 1
    assert "expected what --out writes: Object missing required" in capsys.readouterr().err
    assert main(["bench", "--show", str(tmp_path / "y")]) == 1
    assert capsys.readouterr().err.endswith("/y: No such file or directory\n")
