"""Where the tiny model lies: built once, then shared by tests, quickstart and benchmarks."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tools.tiny_model import corpus


class TinyModel(msgspec.Struct, frozen=True):
    """A base model folder, its adapters' folders, and what they answer.

    ``prompts[i]`` and ``long_prompts[i]`` ask the same in other words, and the long ones share
    their first 40 tokens. To both, greedy decoding answers ``answers[name][i]`` and ends; the name
    ``None`` is the base model. As the one user message of a chat a prompt gets the same answer.
    """

    base: Path
    adapters: dict[str, Path]
    prompts: tuple[str, ...]
    long_prompts: tuple[str, ...]
    answers: dict[str | None, tuple[str, ...]]


def ensure_tiny_model() -> TinyModel:
    """The tiny model of this recipe, trained first, in about a minute, where it is not cached.

    It lies in ``$XDG_CACHE_HOME/sidestream`` or ``~/.cache/sidestream`` under a name that changes
    with the recipe. A second process waits for the one that trains.

    Raises:
        TinyModelError: training failed.
    """
    cache = _cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"tiny-model-{_recipe_hash()}"
    build_once(folder, _build)
    return TinyModel(
        base=folder / "base",
        adapters={voice: folder / voice for voice in corpus.VOICES if voice is not None},
        prompts=corpus.prompts(corpus.PHRASINGS[0]),
        long_prompts=corpus.prompts(corpus.PHRASINGS[-1]),
        answers={voice: corpus.answers(voice) for voice in corpus.VOICES},
    )


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes ``folder`` with ``build`` unless it exists; it only ever exists complete.

    ``build`` fills an empty folder beside it, which is then renamed. Whoever comes meanwhile
    waits, also from another process. What ``build`` raises goes through, and leaves nothing.
    """
    if folder.exists():
        return
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if folder.exists():
            return
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        # A builder that was killed leaves one; none can be at work, as the lock is held here.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            build(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _build(folder: Path) -> None:
    # Torch takes seconds to import, which a cached model does not need.
    from tools.tiny_model.build import build_tiny_model

    build_tiny_model(folder)


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification wants relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "sidestream"


def _recipe_hash() -> str:
    """Changes with any source file of this package."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the kernel releases when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
