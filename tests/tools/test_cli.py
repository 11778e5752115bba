"""The ``sidestream`` command, as a process and against a server of the test."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.tools.fake_server import ADAPTERS, MODELS, FakeServer, chat_events, serving
from tools.cli import main, make_parser
from tools.options.table import OPTIONS
from tools.serve import reserve_port


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


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
        (["serv", "m"], "argument COMMAND: expected one of serve, status,"),
        (["adapters", "lod"], "argument ACTION: expected one of list, load, unload, prefetch,"),
        (["serve", "m", "--prot", "1"], "unrecognized arguments: --prot 1; did you mean --port?"),
        (["status", "--watch", "0"], "argument --watch: expected a number of seconds above 0"),
        (["status", "--watch", "--json"], "--json: expected it without --watch"),
        (["completion", "csh"], "argument SHELL: expected one of bash, zsh, fish, got 'csh'"),
        (["help", "adapters", "lod"], "sidestream adapters has no command 'lod'; did you mean"),
        (["bench", "nothing"], "WORKLOAD: expected one of"),
        (["generate", "x", "--top-p", "2"], "argument --top-p: expected a number of (0, 1]"),
        (["keys"], "the following arguments are required: ACTION"),
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


ASKING_A_SERVER = [
    ["status"],
    ["adapters", "list"],
    ["adapters", "load", "x=/x"],
    ["adapters", "unload", "x"],
    ["adapters", "prefetch", "x"],
    ["generate", "x"],
    ["chat"],
]


@pytest.mark.parametrize("command", ASKING_A_SERVER, ids=" ".join)
def test_no_server_is_one_line_and_status_1(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with reserve_port("127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}"
        assert main([*command, "--url", url]) == 1
    assert capsys.readouterr().err == f"sidestream: no answer from {url}: Connection refused\n"


@pytest.mark.parametrize("command", ASKING_A_SERVER, ids=" ".join)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "ftp://x"], "expected a URL such as http://127.0.0.1:8000, got 'ftp://x'"),
        (["--api-key", "a b"], "--api-key: expected a key of printing ASCII characters"),
    ],
)
def test_what_no_server_could_be_asked_with_is_one_line(
    command: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sidestream: {message}")
    assert error.count("\n") == 1


def test_files_that_are_not_there_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    for command in (["timeline", missing], ["adapters", "inspect", missing]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith("sidestream: ") and "missing" in error
        assert error.count("\n") == 1


def test_a_server_of_others_is_one_line(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = {"/version": (200, "<html>"), "/v1/models": (200, "[]")}
    for command in (["status"], ["chat"], ["generate", "x"]):
        assert main([*command, "--url", server.url]) == 1
        error = capsys.readouterr().err
        assert error.startswith("sidestream: this is no server of ours: ")
        assert error.count("\n") == 1


def test_the_key_of_the_option_goes_before_those_of_the_environment(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDESTREAM_API_KEY", "of-environment")
    server.answers = {"/v1/adapters": (200, ADAPTERS)}
    for options in ([], ["--api-key", "given"]):
        assert main(["adapters", "list", "--url", server.url, *options]) == 0
    assert server.keys == ["Bearer of-environment", "Bearer given"]


def test_help_of_a_command_is_that_of_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "adapters", "load"]) == 0
    by_word = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["adapters", "load", "--help"])
    assert capsys.readouterr().out == by_word


def test_new_keys_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine"
    assert main(["keys", "new", str(path)]) == 0
    assert capsys.readouterr().out == f"public: {path}.key\nsecret: {path}.key_secret\n"
    assert path.with_suffix(".key_secret").stat().st_mode & 0o777 == 0o600
    assert main(["keys", "new", str(path)]) == 1
    assert "a key is never overwritten" in capsys.readouterr().err


def test_adapters_are_listed_with_the_tier_that_they_lie_in(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = {"/v1/adapters": (200, ADAPTERS)}
    assert main(["adapters", "list", "--url", server.url]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["shout", "gpu", "16", "83.9", "MB", "2", "1", "yes", "/shout"],
        ["quiet", "disk", "-", "-", "0", "0", "no", "quiet"],
    ]
    assert main(["adapters", "list", "--json", "--url", server.url]) == 0
    assert msgspec.json.decode(capsys.readouterr().out)[1]["residency"] == "disk"


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


def test_an_address_on_another_machine_is_sent_as_it_is(server: FakeServer) -> None:
    server.answers = {"/v1/load_lora_adapter": (200, "Success")}
    assert main(["adapters", "load", "a=hf://owner/name", "--url", server.url]) == 0
    assert server.asked[0][1]["lora_path"] == "hf://owner/name"


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
    server.answers = {"/v1/chat/completions": (200, chat_events("H", "i"))}
    command = ["generate", "Hello", "--chat", "--model", "shout", "--seed", "1", "--stop", "."]
    assert main([*command, "--url", server.url]) == 0
    assert capsys.readouterr().out == "Hi\n"
    assert server.asked[0][1] == {
        "model": "shout",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 256,
        "temperature": 0,
        "stream": True,
        "seed": 1,
        "stop": ["."],
    }


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
