"""Code is compiled once on a machine, and wherever it can not be kept, each time."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from loader.native.casts import CONVERSIONS, check_float32
from loader.native.fill import fill
assert CONVERSIONS["check"].any()
print("loaded" if fill.stats.cache_hits and check_float32.cache_hits else "compiled")
"""

TOGETHER = """
import threading
from loader.shared_blocks import BlockReader, FinishedBlocks
parts = [BlockReader, BlockReader, BlockReader, FinishedBlocks]
threads = [threading.Thread(target=part, daemon=True) for part in parts]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(50)
    assert not thread.is_alive()
print("compiled")
"""


def start(folder: Path, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    """A process that needs all of the code, kept in ``folder``."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )


def test_code_is_compiled_once_and_again_if_what_was_kept_is_broken(tmp_path: Path) -> None:
    assert start(tmp_path).stdout == "compiled\n"
    assert start(tmp_path).stdout == "loaded\n"
    for path in tmp_path.rglob("*.nb?"):
        path.write_bytes(b"")
    broken = start(tmp_path)
    assert broken.stdout == "compiled\n"
    assert "machine code can be neither kept nor loaded" in broken.stderr


def test_code_is_compiled_where_there_is_no_place_for_it() -> None:
    result = start(Path("/dev/null/nowhere"))
    assert (result.stdout, result.stderr) == ("compiled\n", "")


def test_threads_that_need_the_code_at_once_do_not_block_each_other(tmp_path: Path) -> None:
    assert start(tmp_path, TOGETHER).stdout == "compiled\n"
