"""Where machine code is kept: in a folder of its own, below the first of these that can be written.

1. ``$NUMBA_CACHE_DIR``, and no other if that is set;
2. ``$XDG_CACHE_HOME/sidestream`` or ``~/.cache/sidestream``;
3. ``__pycache__`` beside this file.

The folder's name changes with every source beside this file, with the compiler and the processor.
Numba itself looks only at the file in which a function stands, not at what else went into its code;
and where machines of several kinds share a folder, one could come by what another has just written.
Several processes may fill one folder at once: they write the same.
"""

import hashlib
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path


def writable_code_folder(compiler: str) -> Path | None:
    """The folder, made if need be, of code that ``compiler`` makes; None if it has no place."""
    name = _name(compiler)
    for parent in _parents():
        folder = parent / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    return None


def _parents() -> Iterator[Path]:
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(chosen)
        return
    if cache := os.environ.get("XDG_CACHE_HOME"):
        yield Path(cache) / "sidestream"
    elif home := os.environ.get("HOME"):
        yield Path(home) / ".cache" / "sidestream"
    yield Path(__file__).parent / "__pycache__"


def _name(compiler: str) -> str:
    about = f"{compiler} {platform.machine()} {platform.python_version()}"
    digest = hashlib.blake2b(about.encode(), digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(hashlib.blake2b(source.read_bytes()).digest())
    return f"machine-code-{digest.hexdigest()}"
