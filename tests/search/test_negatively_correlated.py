"""Negatively correlated search against its equations, written out the slow way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fxprune.search import NegativelyCorrelatedSearch
from fxprune.search.base import Array


def bhattacharyya(m: Array, s: Array, x: Array, t: Array) -> float:
    total = 0.0
    for k in range(len(m)):
        c = (s[k] ** 2 + t[k] ** 2) / 2
        total += (m[k] - x[k]) ** 2 / c / 8
        total += 0.5 * (math.log(c) - 0.5 * (math.log(s[k] ** 2) + math.log(t[k] ** 2)))
    return total


def quotient(a: float, b: float) -> float:
    return 0.5 if a + b == 0 else a / (a + b)


def slow(seed: int, start: Array, step: float, generations: int, limit: float) -> list[Array]:
    """The trials of every generation in the unit square."""
    random = np.random.default_rng(seed)
    places, steps = start.copy(), np.full(start.shape, step)
    values = [objective(p) for p in places]
    best, successes, trials = min(values), [0] * len(places), [start]
    for generation in range(1, generations):
        trial = np.clip(places + steps * random.standard_normal(places.shape), 0, 1)
        trials.append(trial)
        fresh = [objective(p) for p in trial]
        best = min(best, *fresh)
        weights = random.normal(1, 0.1 * (1 - generation / generations), len(places))
        moved, known = places.copy(), list(values)
        for i in range(len(places)):
            others = [j for j in range(len(places)) if j != i]
            near = [
                min(bhattacharyya(m, steps[i], places[j], steps[j]) for j in others)
                for m in (trial[i], places[i])
            ]
            bad = quotient(fresh[i] - best, values[i] - best)
            inside = fresh[i] <= limit or values[i] > limit
            if weights[i] * quotient(*near) > bad and inside:
                moved[i], known[i] = trial[i], fresh[i]
                successes[i] += 1
        places, values = moved, known
        if generation % len(places) == 0:
            for i, n in enumerate(successes):
                rate = n / len(places)
                steps[i] *= 1 / 0.9 if rate > 0.2 else 0.9 if rate < 0.2 else 1
            successes = [0] * len(places)
    return trials


def objective(point: Array) -> float:
    return float(((point - 0.4) ** 2).sum() - 0.1)


@pytest.mark.parametrize("limit", [math.inf, 0.0])
def test_trials_follow_the_equations(limit: float) -> None:
    start = np.array([[0.1, 0.9], [0.2, 0.2], [0.8, 0.7], [0.5, 0.1]])
    search = NegativelyCorrelatedSearch(
        [0, 0],
        [1, 1],
        population=4,
        generations=15,
        seed=6,
        start=start,
        step=0.1,
        limit=limit,
        factor=0.9,
    )
    for expected in slow(6, start, 0.1, 15, limit):
        points = search.ask()
        np.testing.assert_allclose(points, expected, rtol=0, atol=1e-12)
        search.tell([objective(p) for p in points])
    assert search.done


def test_equal_fitnesses_are_no_division_by_zero() -> None:
    search = NegativelyCorrelatedSearch([0], [1], population=3, generations=6, seed=0)
    first = search.ask()
    for _ in range(5):
        search.tell([1.0] * len(search.ask()))
    assert not np.array_equal(search.ask(), first)
    assert np.isfinite(search.ask()).all()


@pytest.mark.parametrize("population", [1, 4])
def test_infinite_fitnesses_lose(population: int) -> None:
    def steep(x: Array) -> float:
        return math.inf if x[0] < 0.5 else float(x[0])

    start = np.linspace(0.1, 0.9, population + 1)[1:, None]
    search = NegativelyCorrelatedSearch(
        [0], [1], population=population, generations=60, seed=2, start=start
    )
    while not search.done:
        search.tell([steep(x) for x in search.ask()])
    assert 0.5 <= search.best.point[0] < 0.55


def test_a_searcher_within_the_limit_stays_within() -> None:
    search = NegativelyCorrelatedSearch(
        [0, 0], [1, 1], population=4, generations=40, seed=5, start=[0.1, 0.1], step=0.3, limit=0.0
    )

    def constrained(x: Array) -> float:
        return -float(x.sum()) if x.prod() < 0.3 else 1 + float(x.prod())

    while not search.done:
        search.tell([constrained(x) for x in search.ask()])
        places = np.array(search.state_dict()["own"]["places"])
        assert all(constrained(x) <= 0 for x in places)
    assert search.best.fitness < -1.05  # the corner (1, 0.3) has -1.3, the diagonal -1.095
