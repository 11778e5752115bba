"""What who starts a server sees."""

import socket
from pathlib import Path

import pytest

from tools.cli import main, make_parser
from tools.commands.serve import print_ready
from tools.serve import ReadyServer, plan_server, reserve_port

READY = "Sidestream is ready at http://h:1 (model llama, 0 adapters, took 1.5 s)"


def print_ready_of(folder: Path) -> None:
    model = folder / "llama"
    model.mkdir()
    plan = plan_server(make_parser().parse_args(["serve", str(model)]))
    print_ready(plan, ReadyServer("http://h:1", 1.5, stop=lambda: None))


def test_a_program_gets_one_line_with_the_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_ready_of(tmp_path)
    assert capsys.readouterr().out == f"{READY}\n"


def test_a_person_is_told_what_to_do_next_and_how_to_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    print_ready_of(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["API", "page", "try", "stop"]
    assert "sidestream chat --url http://h:1" in lines[3]


def test_a_busy_port_is_one_line_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with reserve_port("127.0.0.1", 0) as port, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 1
    first, error = capsys.readouterr().err.splitlines()
    assert first.startswith("Starting loader, engine and api for model ")
    assert error == (
        f"sidestream: can not listen at 127.0.0.1:{port}: Address already in use;"
        " --port 0 takes one that is free"
    )
