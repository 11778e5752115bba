"""Trains the tiny model and its adapters, and shows how far it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tools.tiny_model import adapters, model
from tools.tiny_model.training import Report, taught


def build_tiny_model(folder: Path) -> None:
    """Writes ``base`` and one folder for each adapter into the existing, empty ``folder``.

    Uses one core. Progress goes to stderr: a bar on a terminal, and a line for each part.

    Raises:
        TinyModelError: a part could not be taught its answers.
    """
    with _one_thread(), _progress() as progress:
        with _part(progress, "the tiny base model") as report:
            base = taught(model.TinyLlama, None, model.SCHEDULE, report)
        base.freeze()
        (folder / "base").mkdir()
        base.save(folder / "base")

        for recipe in adapters.RECIPES:
            with _part(progress, f"its adapter {recipe.voice}") as report:
                new_adapter = partial(adapters.TinyAdapter, recipe, base)
                adapter = taught(new_adapter, recipe.voice, adapters.SCHEDULE, report)
            (folder / recipe.voice).mkdir()
            adapter.save(folder / recipe.voice)


@contextmanager
def _part(progress: Progress, title: str) -> Iterator[Report]:
    started = time.monotonic()
    task = progress.add_task(f"training {title}", total=1.0)
    yield lambda share: progress.update(task, completed=share)
    progress.remove_task(task)
    progress.console.print(f"trained {title} in {time.monotonic() - started:.0f} s")


def _progress() -> Progress:
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads slow matrices of this size down, and would change the sums' last bits."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
