"""How fast ONNX files run in onnxruntime on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.errors import ConfigError, first_line
from fxprune.onnx_session import open_session
from fxprune.paths import as_path
from fxprune.tables import render_table

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Comparison", "Latency", "compare", "measure"]

_WARM_UP = 5
_RUNS = (20, 2000)  # at least, at most
_SECONDS = 2.0  # spent on each file, unless the number of runs is given


@dataclass(frozen=True)
class Latency:
    """How long one call takes.

    Attributes:
        path: the file.
        median: of the runs, in milliseconds.
        p10: a tenth of the runs were faster, in milliseconds.
        p90: a tenth of the runs were slower, in milliseconds.
        runs: how many runs were timed.
        threads: how many threads onnxruntime had.
        sizes: what the dynamic dimensions were set to.
        bytes: size of the file.
    """

    path: Path
    median: float
    p10: float
    p90: float
    runs: int
    threads: int
    sizes: Mapping[str, int]
    bytes: int

    def __str__(self) -> str:
        return _table((self,))


@dataclass(frozen=True)
class Comparison:
    """Two files timed in turns, so that both met the same disturbances.

    Attributes:
        first: the file compared with.
        second: the file judged.
    """

    first: Latency
    second: Latency

    @property
    def speedup(self) -> float:
        """How many times faster the second file is: the ratio of the medians."""
        return self.first.median / self.second.median

    def __str__(self) -> str:
        ratio, size = self.speedup, self.first.bytes / self.second.bytes
        speed = f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
        volume = f"{size:.2f} times smaller" if size >= 1 else f"{1 / size:.2f} times larger"
        verdict = f"{self.second.path.name} is {speed} and {volume} than {self.first.path.name}."
        return f"{_table((self.first, self.second))}\n\n{verdict}"


def measure(
    onnx_path: str | os.PathLike[str],
    *,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    runs: int | None = None,
) -> Latency:
    """Times one ONNX file on made-up inputs, after warming up.

    Args:
        onnx_path: the file.
        sizes: sizes of dynamic dimensions, by name. Default: 1 where the name contains "batch",
            35 where it contains "time", 16 for any other.
        threads: threads for onnxruntime.
        runs: calls to time. Default: as many as take two seconds, 20 to 2,000.

    Raises:
        ConfigError: the file cannot be run, has no dimension of that name, or a number is not
            positive.
    """
    subject = _Subject(as_path(onnx_path), _checked(sizes, threads, runs), threads)
    _refuse_unknown(sizes, (subject,))
    return subject.latency(_time((subject,), runs)[0])


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    runs: int | None = None,
) -> Comparison:
    """Times two ONNX files in turns; arguments as for :func:`measure`."""
    given = _checked(sizes, threads, runs)
    subjects = tuple(_Subject(as_path(path), given, threads) for path in (first, second))
    _refuse_unknown(sizes, subjects)
    times = _time(subjects, runs)
    return Comparison(*(s.latency(t) for s, t in zip(subjects, times, strict=True)))


class _Subject:
    """An ONNX file ready to run, with inputs to run it on."""

    def __init__(self, path: Path, sizes: Mapping[str, int], threads: int) -> None:
        from fxprune.latency_inputs import dynamic_sizes, make_inputs

        self.path, self.threads = path, threads
        session = open_session(path, threads)
        self.sizes = dynamic_sizes(session.get_inputs(), sizes)
        feed = make_inputs(path, session.get_inputs(), self.sizes)
        self.run: Callable[[], Any] = lambda: session.run(None, feed)
        try:
            for _ in range(_WARM_UP):
                self.run()
        except Exception as error:
            raise ConfigError(
                f"{path} does not run on made-up inputs at {self.sizes or 'its sizes'}: "
                f"{first_line(error)}. Name sizes that fit together."
            ) from error

    def latency(self, seconds: Sequence[float]) -> Latency:
        """Sums up the times of the runs."""
        p10, median, p90 = np.percentile(np.array(seconds) * 1e3, (10, 50, 90)).tolist()
        volume = self.path.stat().st_size
        return Latency(self.path, median, p10, p90, len(seconds), self.threads, self.sizes, volume)


def _time(subjects: Sequence[_Subject], runs: int | None) -> list[list[float]]:
    """Seconds of each run of each subject, which take turns."""
    if runs is None:
        start = time.perf_counter()
        for subject in subjects:
            subject.run()
        one = (time.perf_counter() - start) / len(subjects)
        runs = int(min(max(_SECONDS / max(one, 1e-9), _RUNS[0]), _RUNS[1]))
    times: list[list[float]] = [[] for _ in subjects]
    for _ in range(runs):
        for subject, seconds in zip(subjects, times, strict=True):
            start = time.perf_counter()
            subject.run()
            seconds.append(time.perf_counter() - start)
    return times


def _checked(sizes: Mapping[str, int] | None, threads: int, runs: int | None) -> Mapping[str, int]:
    if not isinstance(sizes, Mapping | None):
        raise ConfigError(f"sizes is {sizes!r}; give numbers by name, such as {{'time': 35}}.")
    given = dict(sizes or {})
    numbers = {**given, "threads": threads, "runs": 1 if runs is None else runs}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ConfigError(f"{name} is {number!r}; it must be an integer, at least 1.")
    return given


def _refuse_unknown(sizes: Mapping[str, int] | None, subjects: Sequence[_Subject]) -> None:
    known = sorted({name for subject in subjects for name in subject.sizes})
    for name in sizes or {}:
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "all sizes are fixed"
            raise ConfigError(f"no dimension is called {name!r}: {there}.")


def _table(latencies: Sequence[Latency]) -> str:
    columns = ("file", "bytes", "median ms", "p10 ms", "p90 ms", "runs", "threads", "sizes")
    rows = [
        (
            latency.path.name,
            latency.bytes,
            latency.median,
            latency.p10,
            latency.p90,
            latency.runs,
            latency.threads,
            ", ".join(f"{name}={size}" for name, size in latency.sizes.items()),
        )
        for latency in latencies
    ]
    return render_table(columns, rows)
