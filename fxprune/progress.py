"""Progress of long work: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

__all__ = ["Tracker", "track"]

# The display on the screen, if any: work inside work adds a row to it, since two displays
# would overwrite each other.
_DISPLAY: ContextVar[Progress | None] = ContextVar("_DISPLAY", default=None)


@dataclass(frozen=True)
class Tracker:
    """A row of the progress display, or nothing at all where there is no display."""

    _display: Progress | None = None
    _row: TaskID | None = None

    def advance(self, amount: float = 1, **values: float) -> None:
        """Report work done.

        Args:
            amount: in the unit of the total.
            **values: numbers to show beside the bar until the next ones, such as ``loss=0.3``.
        """
        if self._display is None or self._row is None:
            return
        if values:
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._display.update(self._row, advance=amount, status=text)
        else:
            self._display.advance(self._row, amount)


@contextmanager
def track(
    description: str, total: float | None = None, *, enabled: bool = True, done: float = 0
) -> Iterator[Tracker]:
    """Show the progress of a piece of work while the block runs.

    The bar goes to standard error and disappears at the end. Nothing is shown when standard error
    is not a terminal.

    Args:
        description: what is being done, in a few words.
        total: amount of work, None where it is not known.
        enabled: False shows nothing anywhere.
        done: amount that is done already, as after a resume.

    Yields:
        The tracker to report to.

    Example:
        >>> with track("count", total=3) as tracker:
        ...     for _ in range(3):
        ...         tracker.advance()
    """
    outer = _DISPLAY.get()
    if not enabled or (outer is None and not sys.stderr.isatty()):
        yield Tracker()
    elif outer is not None:
        with _row(outer, description, total, done) as tracker:
            yield tracker
    else:
        with _new_display() as display, _row(display, description, total, done) as tracker:
            yield tracker


@contextmanager
def _row(
    display: Progress, description: str, total: float | None, done: float
) -> Iterator[Tracker]:
    row = display.add_task(description, total=total, completed=int(done), status="")
    try:
        yield Tracker(display, row)
    finally:
        display.refresh()  # short work would otherwise come and go unseen
        display.remove_task(row)


@contextmanager
def _new_display() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
    )
    display = Progress(
        *columns,
        console=Console(file=sys.stderr),
        transient=True,
        # what the user prints into a pipe must stay in the pipe
        redirect_stdout=sys.stdout.isatty(),
    )
    with display:
        token = _DISPLAY.set(display)
        try:
            yield display
        finally:
            _DISPLAY.reset(token)
