"""README's table of options, and that it is the one of this code."""

import os
import re
from pathlib import Path

import pytest

from tools import reference
from tools.cli import make_parser
from tools.options.environment_variables import ENVIRONMENT_VARIABLES
from tools.options.table import OPTIONS
from tools.reference import SECTION, main, option_table

ROOT = Path(__file__).parents[2]
# Those of the tests, and one that every program has.
OF_OTHERS = {"SIDESTREAM_TEST_DEVICE", "HOME"}


def test_readme_has_the_table_of_this_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_every_option_is_a_row_with_its_default() -> None:
    rows = option_table(make_parser().commands["serve"]).splitlines()
    for option in (option for group in OPTIONS.values() for option in group):
        usage = option.flag if option.parse is None else f"{option.flag} {option.metavar}"
        begin = "| `" + usage.replace("|", "\\|") + "` |"
        assert sum(row.startswith(begin) for row in rows) == 1, option.flag
    port = next(row for row in rows if row.startswith("| `--port"))
    assert port.startswith("| `--port PORT` | 8000 | TCP port to listen at; 0 takes any")


def test_an_old_table_is_told_and_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- {SECTION} -->\nold\n<!-- end of {SECTION} -->\nafter\n")
    monkeypatch.setattr(reference, "README", readme)
    assert main(["--check"]) == 1
    assert "python -m tools.reference renews it" in capsys.readouterr().err
    assert main([]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text.splitlines()
    assert main(["--check"]) == 0


def test_a_file_without_the_markers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("no table here\n")
    monkeypatch.setattr(reference, "README", tmp_path / "README.md")
    assert main([]) == 1
    assert "end of options of serve" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "no table here\n"


def test_every_variable_that_the_code_reads_is_explained() -> None:
    read = re.compile(r"""environ(?:\.get\(|\[)["']([A-Z_]+)["']""")
    names: set[str] = set()
    for package in ("api", "engine", "ipc", "loader", "tools"):
        for folder, _, files in os.walk(ROOT / package):
            for file in files:
                # Checks and benchmarks are no part of the command.
                if (
                    file.endswith(".py")
                    and "gpu_checks" not in folder
                    and "tiny_model" not in folder
                ):
                    names |= set(read.findall((Path(folder) / file).read_text()))
    assert names - {"PYTHONPATH", "PATH"} - OF_OTHERS <= ENVIRONMENT_VARIABLES.keys()
