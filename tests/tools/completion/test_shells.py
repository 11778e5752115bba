"""Completion, asked of the shells themselves where they are installed."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.cli import make_parser
from tools.completion.command import SHELLS
from tools.completion.words import commands_of

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def script(shell: str) -> str:
    return SHELLS[shell](tuple(commands_of(make_parser())))


def bash(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of ``words``, as its line editor would have split them."""
    code = (
        f"{script('bash')}\n"
        f"COMP_WORDS=({shlex.join(['sidestream', *words])}) COMP_CWORD={len(words)}\n"
        "complete -p sidestream > /dev/null || exit 1\n_sidestream\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-u", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    assert done.stderr == ""
    return sorted(done.stdout.split())


@needs_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["se"], ["serve"]),
        (["adapters", ""], ["--help", "-h", "inspect", "list", "load", "prefetch", "unload"]),
        (["adapters", "l"], ["list", "load"]),
        (["serve", "--device", ""], ["auto", "cpu", "cuda"]),
        (["serve", "--device", "=", "cu"], ["cuda"]),
        (["serve", "--device", "="], ["auto", "cpu", "cuda"]),
        (["serve", "model", "--max-num-s"], ["--max-num-seqs"]),
        (["serve", "--trace", "tr"], ["trace.json"]),
        (["serve", "mod"], ["models"]),
        (["serve", "--lora", "a", "=", "mod"], ["models"]),
        (["adapters", "load", "a", "=", "mod"], ["models"]),
        (["serve", "--port", ""], []),
        (["bench", "rank-256-ro"], ["rank-256-rotating"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["timeline", "tr"], ["trace.json"]),
    ],
)
def test_bash_offers_what_can_stand_there(
    tmp_path: Path, words: list[str], offered: list[str]
) -> None:
    (tmp_path / "trace.json").touch()
    (tmp_path / "models").mkdir()
    assert bash(tmp_path, *words) == offered


@needs_bash
def test_bash_knows_every_option_of_serve(tmp_path: Path) -> None:
    assert bash(tmp_path, "serve", "--") == sorted(
        flag for flag in make_parser().commands["serve"].flags if flag.startswith("--")
    )


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sidestream adapters l", {"list", "load"}),
        ("sidestream serve --device c", {"cpu", "cuda"}),
        ("sidestream serve --max-num-s", {"--max-num-seqs"}),
        ("sidestream adapters load a=tr", {"a=trace.json"}),
        ("sidestream serve --trace tr", {"trace.json"}),
    ],
)
def test_fish_offers_what_can_stand_there(tmp_path: Path, line: str, offered: set[str]) -> None:
    (tmp_path / "trace.json").touch()
    code = f"{script('fish')}\ncomplete -C {shlex.quote(line)}"
    command = ["fish", "-N", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == ""
    assert {answer.split("\t")[0] for answer in done.stdout.splitlines()} == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_takes_the_script() -> None:
    done = subprocess.run(["zsh", "-n"], input=script("zsh"), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_every_word_of_every_command_is_in_the_script(shell: str) -> None:
    written = script(shell)
    for command in commands_of(make_parser()):
        for flag in command.flags:
            for name in flag.names:
                known = f"*{name}" if shell == "zsh" else f" {name.lstrip('-')} "
                assert known in written, (command.words, name)
        assert all(child in written for child in command.children)
