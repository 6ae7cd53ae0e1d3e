"""Bisection finds where a constraint begins to bite."""

from __future__ import annotations

import pytest

from fxprune.search import BisectionSearch
from fxprune.search.base import Array


def run(search: BisectionSearch, border: float) -> list[list[float]]:
    asked = []
    while not search.done:
        points = search.ask()
        asked += points.tolist()
        search.tell([-x if x <= border else 1.0 for x in (float(p.max()) for p in points)])
    return asked


@pytest.mark.parametrize("population", [1, 3, 8])
@pytest.mark.parametrize("border", [0.0, 0.123, 0.5, 0.98])
def test_the_border_is_found(population: int, border: float) -> None:
    search = BisectionSearch([0.0], [1.0], population=population, generations=30)
    run(search, border)
    if border >= 1e-4:
        assert border - 1e-4 <= -search.best.fitness <= border
    assert search.generation < 20


def test_a_population_of_one_halves() -> None:
    search = BisectionSearch([0.0], [1.0], population=1, generations=5)
    assert [x for (x,) in run(search, 0.3)] == [1.0, 0.5, 0.25, 0.375, 0.3125]


def test_it_ends_at_once_where_everything_is_allowed() -> None:
    search = BisectionSearch([0.0, 0.4], [1.0, 0.9], population=2)
    asked = run(search, 1.0)
    assert asked == [[0.5, 0.5], [1.0, 0.9]]
    assert search.best.point.tolist() == [1.0, 0.9]


@pytest.mark.parametrize("population", [1, 3])
def test_a_narrow_bracket_is_tried_once(population: int) -> None:
    search = BisectionSearch([0.0], [5e-5], population=population)
    assert run(search, 1.0)[-1] == [5e-5]
    assert (search.generation, search.best.point.tolist()) == (1, [5e-5])


def test_one_number_stands_for_all_within_their_bounds() -> None:
    search = BisectionSearch([0.0, 0.6], [1.0, 0.9], population=4)
    points: Array = search.ask()
    expected = [[0.25, 0.6], [0.5, 0.6], [0.75, 0.75], [1.0, 0.9]]
    assert points.tolist() == [pytest.approx(e, abs=1e-15) for e in expected]


def test_a_border_that_is_crossed_twice_is_left_on_the_allowed_side() -> None:
    search = BisectionSearch([0.0], [1.0], population=4, generations=20)
    while not search.done:
        search.tell([0.0 if x < 0.3 or 0.6 < x < 0.8 else 1.0 for x in search.ask()[:, 0]])
    assert search.best.fitness == 0.0
    assert 0.8 - 1e-4 < search.state_dict()["own"]["below"] < 0.8
