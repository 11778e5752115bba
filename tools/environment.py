"""Creates the virtual environment of a clone; ``tools/environment`` calls it.

Prints the path of the environment's interpreter on stdout and progress on stderr. It runs before
anything is installed, so it uses the standard library only.
"""

import ctypes.util
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A plain "torch" brings gigabytes of CUDA libraries along, so a machine without a GPU asks for
# this build: where pip is configured to look, then at PyTorch's own index.
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_TORCH = "torch>=2.11"

_SECONDS_BETWEEN_SIGNS_OF_LIFE = 15.0


class EnvironmentFailed(Exception):
    """The environment could not be created; the message is for the user."""


def ensure_environment(root: Path, extras: Iterable[str]) -> Path:
    """The interpreter of ``root/.venv``, in which the project and ``extras`` are installed.

    Where there is an NVIDIA GPU, what it needs is among them. An environment whose stamp matches
    ``pyproject.toml`` is returned as it is; any other one is created or completed. The stamp is
    written last, so an interrupted run is taken up again.

    Raises:
        EnvironmentFailed: pip failed.
    """
    folder = root / ".venv"
    python = folder / "bin" / "python"
    stamp = folder / "sidestream.json"
    pyproject_hash = hashlib.sha256((root / "pyproject.toml").read_bytes()).hexdigest()

    installed = _installed_extras(stamp, pyproject_hash) if python.exists() else None
    wanted = sorted({*extras, *(installed or ()), *(["cuda"] if _has_nvidia_gpu() else ())})
    if installed == wanted:
        return python

    stamp.unlink(missing_ok=True)
    if not python.exists():
        _say("creating .venv")
        _create(folder)
    _install_torch(python)
    suffix = f"[{','.join(wanted)}]" if wanted else ""
    _pip(python, f"Sidestream{suffix}", "--editable", f"{root}{suffix}")
    stamp.write_text(json.dumps({"pyproject": pyproject_hash, "extras": wanted}))
    return python


def _installed_extras(stamp: Path, pyproject_hash: str) -> list[str] | None:
    """The extras in an environment that is complete, None for one that is not."""
    try:
        content = json.loads(stamp.read_text())
        return list(content["extras"]) if content["pyproject"] == pyproject_hash else None
    except (OSError, ValueError, KeyError):
        return None


def _create(folder: Path) -> None:
    # Debian ships ensurepip in a package of its own; this interpreter's pip then installs.
    with_pip = importlib.util.find_spec("ensurepip") is not None
    venv.create(folder, clear=True, symlinks=True, with_pip=with_pip)


def _install_torch(python: Path) -> None:
    if _has_nvidia_gpu():
        _pip(python, f"{GPU_TORCH} for CUDA", GPU_TORCH)
        return
    try:
        _pip(python, CPU_TORCH, CPU_TORCH)
    except EnvironmentFailed:
        where = "PyTorch's CPU index"
        _pip(python, f"{CPU_TORCH} from {where}", "--extra-index-url", CPU_TORCH_INDEX, CPU_TORCH)


def _has_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver is there, as torch would look for it."""
    return ctypes.util.find_library("cuda") is not None or shutil.which("nvidia-smi") is not None


def _pip(python: Path, title: str, *arguments: str) -> None:
    """Runs ``pip install`` with ``arguments``, and tells now and then that it still does.

    Raises:
        EnvironmentFailed: with pip's own errors.
    """
    own_pip = python.parent / "pip"
    pip = [str(python), "-m", "pip"]
    if not own_pip.exists():
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
    _say(f"installing {title}")
    started = time.monotonic()
    with subprocess.Popen(
        [*pip, "install", *quiet, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=_SECONDS_BETWEEN_SIGNS_OF_LIFE)
                break
            except subprocess.TimeoutExpired:
                _say(f"  still installing, {time.monotonic() - started:.0f} s")
    if process.returncode != 0:
        raise EnvironmentFailed(f"pip could not install {title}:\n{output.strip()}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """The exit status."""
    try:
        print(ensure_environment(ROOT, sys.argv[1:]))
    except EnvironmentFailed as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
