"""The run folder: who is in it, and who removes it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ipc.endpoints import RunFolder
from ipc.errors import Unavailable

TENANT = """
import sys
from pathlib import Path
from ipc.endpoints import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.enter()
print("in", flush=True)
sys.stdin.read()
folder.leave()
"""


def enter_elsewhere(folder: RunFolder) -> "subprocess.Popen[str]":
    """Another process that is in ``folder`` until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", TENANT, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.communicate(timeout=20)


def leave_behind(folder: RunFolder) -> None:
    """What dead processes leave: a socket that nobody listens at, a catalog half written."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(folder.handover_path))
    folder.catalog_path.write_text("{}")
    folder.catalog_path.with_name("adapters.json.new").write_text("{")


def test_only_its_user_may_enter_a_new_folder(tmp_path: Path) -> None:
    folder = RunFolder.create([tmp_path])
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_last_one_out_removes_the_folder_and_what_the_dead_left(tmp_path: Path) -> None:
    folder = RunFolder.create([tmp_path])
    leave_behind(folder)
    tenant = enter_elsewhere(folder)
    folder.leave()
    assert folder.catalog_path.exists(), "somebody is still in it"
    end(tenant)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_no_longer_in_the_folder(tmp_path: Path) -> None:
    folder = RunFolder.create([tmp_path])
    tenant = enter_elsewhere(folder)
    tenant.kill()
    end(tenant)
    folder.leave()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_leave_at_once_one_removes_the_folder(tmp_path: Path) -> None:
    folder = RunFolder.create([tmp_path])
    leave_behind(folder)
    tenants = [enter_elsewhere(folder) for _ in range(6)]
    folder.leave()
    for tenant in tenants:
        assert tenant.stdin is not None
        tenant.stdin.close()
    for tenant in tenants:
        assert tenant.wait(20) == 0
        assert tenant.stdout is not None
        tenant.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_sweeps_those_that_nobody_is_in_and_no_others(tmp_path: Path) -> None:
    inhabited = RunFolder.create([tmp_path])
    abandoned = RunFolder(tmp_path / "sidestream-run-abandoned")
    abandoned.path.mkdir()
    leave_behind(abandoned)
    tenant = enter_elsewhere(abandoned)
    tenant.kill()
    end(tenant)
    foreign = tmp_path / "sidestream-run-notes"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    new = RunFolder.create([tmp_path])
    assert sorted(tmp_path.iterdir()) == sorted([inhabited.path, foreign, new.path])
    assert (foreign / "notes.txt").read_text() == "mine"
    for folder in (inhabited, new):
        folder.remove()


def test_a_folder_is_made_in_the_first_place_that_can_have_one(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    folder = RunFolder.create([long, tmp_path / "missing", tmp_path])
    assert folder.path.parent == tmp_path
    assert len(os.fsencode(folder.handover_path)) <= 107
    folder.remove()


def test_no_place_for_a_folder_says_why_for_each(tmp_path: Path) -> None:
    missing, long = Path("/missing"), tmp_path / ("x" * 100)
    expected = r"no place for the run folder \(/missing: No such file.*x: too long for the path"
    with pytest.raises(Unavailable, match=expected):
        RunFolder.create([missing, long])
