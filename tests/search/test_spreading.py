"""Points spread over executors; those that die, and errors that are the function's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import pytest

from fxprune.search import Spread
from fxprune.search.spreading import needs_pickle


class Dying(Executor):
    """Runs things at once, and after some of them no more."""

    def __init__(self, lives: int) -> None:
        self.lives = lives

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.lives -= 1
        if self.lives < 0:
            future.set_exception(BrokenProcessPool("a worker vanished"))
            return future
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def square(x: int) -> int:
    return x * x


def test_results_come_in_order() -> None:
    done: list[int] = []
    with ThreadPoolExecutor(3) as executor:
        spread = Spread(square, executor)
        assert spread(range(6), lambda: done.append(1)) == [0, 1, 4, 9, 16, 25]
    assert len(done) == 6
    assert spread.failure is None


@pytest.mark.parametrize("lives", [0, 2, 5])
def test_an_executor_that_dies_is_replaced_by_this_process(
    lives: int, caplog: pytest.LogCaptureFixture
) -> None:
    own: list[int] = []

    def local(x: int) -> int:
        own.append(x)
        return square(x)

    spread = Spread(local, Dying(lives), square)
    assert spread(range(4)) + spread(range(4)) == [0, 1, 4, 9] * 2
    assert len(own) == 8 - lives
    assert spread.failure == "BrokenProcessPool: a worker vanished"
    assert caplog.messages == [
        "the executor failed (BrokenProcessPool: a worker vanished): going on in process"
    ]


def test_a_closed_executor_is_replaced_too() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    spread = Spread(square, executor)
    assert spread([3]) == [9]
    assert spread.failure is not None and "shutdown" in spread.failure


def test_errors_of_the_function_are_raised_as_they_are() -> None:
    def fail(x: int) -> int:
        raise KeyError(x)

    spread = Spread(fail, Dying(5))
    with pytest.raises(KeyError, match="7"):
        spread([7])
    assert spread.failure is None


def test_only_other_processes_need_pickles() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert not needs_pickle(threads)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as processes:
        assert needs_pickle(processes)
        assert processes.submit(os.getpid).result() != os.getpid()
    assert not needs_pickle(threads)  # dead: there is nobody to send anything to
