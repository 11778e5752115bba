"""A run's progress, for whoever waits for it."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tools.bench.load_run import RunProgress


class ProgressBar:
    """One line a server, drawn only when it changes: a thread of its own would delay the streams.

    Draws nothing where ``console`` is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """The next server's turn."""
        self._task = self._progress.add_task(escape(name), total=None, status="")

    def phase(self, text: str) -> None:
        """What is done before requests are counted."""
        self._update(status=text)

    def show(self, run: RunProgress) -> None:
        failed = f", [red]{run.failed} failed[/]" if run.failed else ""
        self._update(
            status=f"{run.ended} of {run.total}, {run.open} open{failed}",
            completed=run.ended,
            total=run.total,
        )

    def _update(self, status: str, completed: int | None = None, total: int | None = None) -> None:
        if self._task is not None:
            self._progress.update(self._task, status=status, completed=completed, total=total)
            self._progress.refresh()
