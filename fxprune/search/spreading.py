"""Evaluating the points of a generation by an executor, and without it once that fails."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

__all__ = ["Spread", "needs_pickle"]

_LOG = logging.getLogger("fxprune")

T = TypeVar("T")
R = TypeVar("R")


class Spread(Generic[T, R]):
    """Maps a function over points, in parallel as long as the executor lives.

    Whatever the executor does not deliver is computed in process: an error of the function shows
    up there as it is, and if there is none, the executor is to blame and is not used again.

    Args:
        local: computes a point in this process; thread-safe if the executor has threads.
        executor: None computes in process from the start.
        remote: what the executor runs, by default ``local``; picklable for other processes.

    Attributes:
        remote: what the executor runs; may be replaced between calls.
        failure: why the executor was given up, in words; None as long as it was not.
    """

    def __init__(
        self,
        local: Callable[[T], R],
        executor: Executor | None = None,
        remote: Callable[[T], R] | None = None,
    ) -> None:
        self._local, self._executor, self.remote = local, executor, remote or local
        self.failure: str | None = None

    def __call__(self, points: Sequence[T], done: Callable[[], object] = lambda: None) -> list[R]:
        """The results in the order of the points; ``done`` is called after each."""
        futures = [self._submit(point) for point in points]
        results = []
        try:
            for point, future in zip(points, futures, strict=True):
                results.append(self._result(point, future))
                done()
        finally:
            for future in futures:
                if future is not None:
                    future.cancel()
        return results

    def _submit(self, point: T) -> Future[R] | None:
        if self._executor is None or self.failure is not None:
            return None
        try:
            return self._executor.submit(self.remote, point)
        except Exception as error:  # a broken or closed pool; each kind has errors of its own
            self._give_up(error)
            return None

    def _result(self, point: T, future: Future[R] | None) -> R:
        if future is None or (self.failure is not None and not future.done()):
            return self._local(point)
        try:
            return future.result()
        except Exception as error:
            result = self._local(point)  # raises what is wrong with the point itself
            self._give_up(error)
            return result

    def _give_up(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = f"{type(error).__name__}: {error}" if str(error) else repr(error)
            _LOG.warning("the executor failed (%s): going on in process", self.failure)


def needs_pickle(executor: Executor) -> bool:
    """Whether an executor runs things in other processes; False for threads, and if it is dead."""
    try:
        return executor.submit(_here).result() != _here()
    except Exception:
        return False


def _here() -> tuple[str, int]:
    return platform.node(), os.getpid()
