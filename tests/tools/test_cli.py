"""The ``sidestream`` command, as a process and against a server of the test."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from tools.cli import main, make_parser
from tools.options.table import OPTIONS
from tools.serve import reserve_port


class Recorded(BaseHTTPRequestHandler):
    """Answers with what the test has prepared for a path, and remembers what it was asked."""

    server: "FakeServer"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, msgspec.json.decode(body)))
        self._answer()

    def _answer(self) -> None:
        status, body = self.server.answers[self.path]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Recorded)
        self.answers: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


MODELS = """{"object": "list", "data": [
    {"id": "tiny", "root": "/tiny", "parent": null},
    {"id": "shout", "root": "/shout", "parent": "tiny"},
    {"id": "quiet", "root": "quiet", "parent": "tiny"}
]}"""
METRICS = (
    "# TYPE vllm:lora_adapter_loaded gauge\n"
    'vllm:lora_adapter_loaded{adapter_name="shout",level="gpu",pinned="true",rank="16"} 1.0\n'
)


def test_help_explains_every_option() -> None:
    command = subprocess.run(
        [sys.executable, "-m", "tools.cli", "serve", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        check=True,
    )
    for option in (option for group in OPTIONS.values() for option in group):
        assert option.help.removesuffix(".") in command.stdout, option.flag
    for flag in ("--lora ", "--pin ", "--lora-dir ", "--adapter-root ", "--served-model-name "):
        assert flag in command.stdout
    assert "(default: 4GiB)" in command.stdout


def test_the_command_is_there_without_what_only_the_engine_and_plots_need() -> None:
    code = "import sys, tools.cli; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "tools.cli" in loaded
    assert {"torch", "triton", "transformers", "matplotlib"}.isdisjoint(loaded)


def test_help_goes_from_where_the_server_listens_to_how_its_processes_are_watched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    titles = re.findall(r"^(\w+):$", capsys.readouterr().out, re.MULTILINE)
    assert titles[-6:] == ["HTTP", "RPC", "model", "batching", "adapters", "process"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; sidestream --help explains"),
        (["serve", "/no/model"], "MODEL: expected a folder, but there is none at /no/model"),
        (["serve", "m", "--block-size", "0"], "argument --block-size: expected a whole number"),
        (["serve", "m", "--device", "tpu"], "argument --device: expected one of auto|cpu|cuda"),
        (["serve", "m", "--max-adapter"], "unrecognized arguments: --max-adapter"),
        (["adapters", "prefetch"], "the following arguments are required: NAME"),
        (["adapters", "load", "x"], "argument NAME=PATH: expected NAME=PATH, got 'x'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = int(str(ended.code))
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith(f"sidestream: {message}")
    assert output.err.count("\n") == 1


def test_no_server_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with reserve_port("127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}"
        assert main(["adapters", "list", "--url", url]) == 1
    assert capsys.readouterr().err == f"sidestream: no answer from {url}: Connection refused\n"


def test_adapters_are_listed_with_the_tier_that_they_lie_in(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = {"/v1/models": (200, MODELS), "/metrics": (200, METRICS)}
    assert main(["adapters", "list", "--url", server.url]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["shout", "gpu", "16", "yes", "/shout"], ["quiet", "disk", "quiet"]]


def test_loading_sends_an_absolute_path_and_what_was_asked_for(server: FakeServer) -> None:
    server.answers = {"/v1/load_lora_adapter": (200, "Success")}
    command = ["adapters", "load", "shout=there", "--pin", "--replace", "--url", server.url]
    assert main(command) == 0
    body = {
        "lora_name": "shout",
        "lora_path": os.path.join(os.getcwd(), "there"),
        "load_inplace": True,
        "pinned": True,
    }
    assert server.asked == [("/v1/load_lora_adapter", body)]


def test_prefetching_says_where_each_adapter_lies(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "/v1/prefetch_lora_adapters"
    data = [{"lora_name": "shout", "residency": "gpu"}, {"lora_name": "json", "residency": "disk"}]
    server.answers = {path: (200, msgspec.json.encode({"data": data}).decode())}
    assert main(["adapters", "prefetch", "shout", "json", "--url", server.url]) == 0
    assert server.asked == [(path, {"lora_names": ["shout", "json"]})]
    assert capsys.readouterr().out == "shout lies in gpu\njson lies in disk\n"


def test_an_error_of_the_server_is_shown_in_its_own_words(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    error = '{"error": {"message": "no adapter [x]", "type": "t", "param": null, "code": "c"}}'
    server.answers = {"/v1/unload_lora_adapter": (404, error)}
    assert main(["adapters", "unload", "x", "--url", server.url]) == 1
    assert capsys.readouterr().err == "sidestream: no adapter [x]\n"


def test_generated_text_is_printed_as_it_comes(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    events = 'data: {"choices": [{"text": "Pa"}]}\n\ndata: {"choices": [{"text": "ris."}]}\n\n'
    server.answers = {
        "/v1/models": (200, MODELS),
        "/v1/completions": (200, events + "data: [DONE]"),
    }
    assert main(["generate", "Capital?", "--max-tokens", "9", "--url", server.url]) == 0
    assert capsys.readouterr().out == "Paris.\n"
    body = {
        "model": "tiny",
        "prompt": "Capital?",
        "max_tokens": 9,
        "temperature": 0,
        "stream": True,
    }
    assert server.asked == [("/v1/completions", body)]


def test_a_chat_is_asked_at_the_chat_endpoint(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    events = 'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n'
    server.answers = {"/v1/chat/completions": (200, events)}
    command = ["generate", "Hello", "--chat", "--model", "shout", "--seed", "1"]
    assert main([*command, "--url", server.url]) == 0
    assert capsys.readouterr().out == "Hi\n"
    assert server.asked[0][1]["messages"] == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ('data: {"error": {"message": "the engine died"}}\n\n', "the engine died"),
        ('data: {"choices": []}\n\n', "the server ended the answer before it was complete"),
    ],
)
def test_an_answer_that_breaks_off_fails_the_command(
    server: FakeServer, capsys: pytest.CaptureFixture[str], events: str, message: str
) -> None:
    server.answers = {"/v1/completions": (200, events)}
    assert main(["generate", "Hello", "--model", "tiny", "--url", server.url]) == 1
    assert capsys.readouterr().err == f"sidestream: {message}\n"


def test_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--version"])
    assert capsys.readouterr().out.startswith("sidestream ")
