"""What the commands print: progress on stderr, results on stdout."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def told_of(option: str | None = None) -> Iterator[None]:
    """What a person can mend, a `ValueError` within, is told without a traceback; of this option, where one is to blame."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


class Steps:
    """Progress over a known number of steps: a bar on a terminal, else a line for each step.

    Parameters
    ----------
    total : int
        How often `next` will be called.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.console = Console(stderr=True)
        self.bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "Steps":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.bar.stop()

    def next(self, what: str) -> None:
        """Say what is done now; what was said before is finished."""
        self.bar.update(self.task, completed=self.done, description=what)
        self.done += 1
        if not self.console.is_terminal:
            self.console.print(f"[{self.done}/{self.total}] {what}", markup=False, highlight=False)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column on the left, the others on the right."""
    ruler = ["---"] + ["---:"] * (len(headings) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, ruler, *rows])


def clock(seconds: float) -> str:
    """A duration to read."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def spread(timing: Mapping[str, Any]) -> str:
    """The fastest and the slowest run, in one unit."""
    low, high = timing["min"], timing["max"]
    if high >= 1:
        return f"{low:.2f} to {high:.2f} s"
    return f"{low * 1e3:.1f} to {high * 1e3:.1f} ms" if high >= 1e-3 else f"{low * 1e6:.1f} to {high * 1e6:.1f} µs"


def times(factor: float) -> str:
    """A speedup to read."""
    return f"{factor:.1f}×" if factor < 100 else f"{factor:.0f}×"
