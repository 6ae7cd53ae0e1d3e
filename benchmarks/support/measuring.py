"""Timing in turns, and targets that decide the exit code.

Times are CPU seconds of the process with one thread: what else the machine does disturbs them
least. Only ratios of times from one run mean anything.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch

from fxprune.tables import render_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["Target", "conclude", "cpu_seconds", "medians", "show", "single_thread"]


@dataclass(frozen=True)
class Target:
    """A measured number beside the one it has to meet.

    Attributes:
        name: what was measured.
        measured: the number.
        limit: what it may be at most, or has to be at least.
        at_least: whether more is better.
    """

    name: str
    measured: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the number is good enough."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


def single_thread() -> None:
    """Lets torch use one thread, so that CPU seconds are those of the work."""
    torch.set_num_threads(1)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call; objects made before it cost the garbage collector nothing."""
    gc.collect()
    gc.freeze()
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    gc.unfreeze()
    del result
    return seconds


def medians(measures: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """The median of each measure; they take turns, after one round to warm up."""
    for measure in measures:
        measure()
    taken = [[measure() for measure in measures] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table under a title."""
    print(f"\n{title}\n\n{render_table(columns, rows)}", flush=True)


def conclude(targets: Sequence[Target]) -> NoReturn:
    """Prints every target with its verdict and leaves; the exit code is 1 if any was missed."""
    show(
        "Targets",
        ("what", "measured", "target", "met"),
        [
            (t.name, t.measured, f"{'>=' if t.at_least else '<='} {t.limit:g}", _verdict(t))
            for t in targets
        ],
    )
    sys.exit(any(not t.met for t in targets))


def _verdict(target: Target) -> str:
    return "pass" if target.met else "FAIL"
