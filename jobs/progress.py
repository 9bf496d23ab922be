"""One progress bar for all commands: on stderr, on terminals alone, with rate and remaining time.

Elsewhere nothing is drawn, and pipelines are not asked to report: a log has lines, not bars.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Bar:
    """What a command tells the bar, whether it is drawn or not."""

    def __init__(self, progress: Progress, unit: str, drawn: bool) -> None:
        self.drawn = drawn
        self._progress = progress
        self._task = progress.add_task("starting", total=None, unit=unit)

    def update(self, text: str, done: float, total: int | None = None) -> None:
        """text: what is being done, or was done so far. Counting begins again where `done` goes back."""
        if done < self._progress.tasks[0].completed:
            self._progress.reset(self._task, total=total)
        self._progress.update(self._task, description=text, completed=done, total=total)

    def print(self, line: str) -> None:
        """A line of a log, above the bar."""
        self._progress.console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress_bar(unit: str) -> Iterator[Bar]:
    """unit: what is counted, for the rate."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Done(),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    drawn = console.is_terminal
    with Progress(*columns, console=console, disable=not drawn) as progress:
        yield Bar(progress, unit, drawn)


class _Done(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f}" + ("" if task.total is None else f" of {task.total:,.0f}"))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(rate(task.finished_speed or task.speed, unit), style="progress.data.speed")


def rate(speed: float | None, unit: str) -> str:
    """`12 rows/s`; the time for one where that takes longer than a second."""
    if not speed:
        return ""
    one = unit.removesuffix("s")
    return (
        f"{speed:,.0f} {unit}/s"
        if speed >= 10
        else f"{speed:.1f} {unit}/s"
        if speed >= 1
        else f"{1 / speed:.1f} s/{one}"
    )
