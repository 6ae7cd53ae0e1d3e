"""What every search must do, and what each does by its definition."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fxprune.errors import ConfigError
from fxprune.randomness import random_state
from fxprune.search import (
    BisectionSearch,
    CmaSearch,
    NegativelyCorrelatedSearch,
    RandomSearch,
    Search,
)
from fxprune.search.base import Array

LOW, HIGH = [0.0, -2.0, 1.0], [1.0, 2.0, 1.0]  # the last one is fixed


def cma(*args: Any, **options: Any) -> Search:
    pytest.importorskip("cma")
    return CmaSearch(*args, **options)


def seeded(kind: Callable[..., Search], seed: int = 3) -> Callable[..., Search]:
    return lambda low, high, **options: kind(low, high, seed=seed, **options)


KINDS = {
    "ncs": seeded(NegativelyCorrelatedSearch),
    "random": seeded(RandomSearch),
    "bisection": BisectionSearch,
    "cma": seeded(cma),
}
every = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def bowl(point: Array) -> float:
    return float(((point - np.array([0.3, 0.5, 1.0])) ** 2).sum())


def run(search: Search, generations: int, function: Callable[[Array], float] = bowl) -> None:
    for _ in range(generations):
        search.tell([function(point) for point in search.ask()])


@every
def test_points_lie_in_the_box_and_the_best_is_the_best(kind: Callable[..., Search]) -> None:
    search = kind(LOW, HIGH, population=4, generations=6)
    told: list[tuple[float, list[float]]] = []
    while not search.done:
        points = search.ask()
        assert points.shape == (4, 3)
        assert (points >= LOW).all() and (points <= HIGH).all()
        assert np.array_equal(points, search.ask())
        told += [(bowl(point), point.tolist()) for point in points]
        search.tell([bowl(point) for point in points])
    assert 0 < search.generation <= 6
    assert (search.best.fitness, search.best.point.tolist()) == min(told, key=lambda pair: pair[0])


@every
@pytest.mark.parametrize("asked", [False, True])
def test_a_saved_search_goes_on_as_if_nothing_had_happened(
    kind: Callable[..., Search], asked: bool
) -> None:
    whole = kind(LOW, HIGH, population=4, generations=8)
    run(whole, 3)
    if asked:
        whole.ask()
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    other = kind(LOW, HIGH, population=4, generations=8)
    run(other, 1)  # what it did before does not matter
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        assert np.array_equal(whole.ask(), other.ask())
        run(whole, 1)
        run(other, 1)
    assert whole.best.fitness == other.best.fitness
    assert np.array_equal(whole.best.point, other.best.point)


@every
def test_a_search_leaves_the_global_random_state_alone(kind: Callable[..., Search]) -> None:
    before = random_state()
    run(kind(LOW, HIGH, population=4, generations=3), 3)
    after = random_state()
    assert after["numpy"] == before["numpy"] and after["python"] == before["python"]
    assert torch.equal(after["torch"], before["torch"])


def test_cma_needs_two_dimensions() -> None:
    with pytest.raises(ConfigError, match="at least two numbers to search, got one"):
        CmaSearch([0.0], [1.0])


@pytest.mark.parametrize("kind", [NegativelyCorrelatedSearch, RandomSearch, cma])
def test_the_seed_decides(kind: Callable[..., Search]) -> None:
    points = []
    for seed in (1, 1, (1, 2), 5):
        search = kind([0, 0], [1, 1], population=4, generations=4, seed=seed)
        run(search, 3, lambda x: float(x.sum()))
        points.append(search.ask())
    assert np.array_equal(points[0], points[1])
    assert not np.allclose(points[0], points[2]) and not np.allclose(points[0], points[3])


@pytest.mark.parametrize(("kind", "limit"), [(NegativelyCorrelatedSearch, 2e-3), (cma, 1e-6)])
def test_a_bowl_has_a_bottom(kind: Callable[..., Search], limit: float) -> None:
    search = kind([0, -2], [1, 2], population=8, generations=100, seed=1, step=0.2)
    run(search, 100, lambda x: bowl(np.append(x, 1)))
    assert search.best.fitness < limit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [1]), "two lists of equally many numbers"),
        (([], []), "two lists of equally many numbers"),
        (([1], [0]), "finite and in order"),
        (([0], [math.inf]), "finite and in order"),
    ],
)
@every
def test_bounds_that_make_no_sense_are_refused(
    kind: Callable[..., Search], arguments: tuple[Any, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(*arguments, population=4)


@every
@pytest.mark.parametrize("option", [{"population": 0}, {"generations": 0}, {"population": 2.5}])
def test_budgets_that_make_no_sense_are_refused(
    kind: Callable[..., Search], option: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="integer of at least 1"):
        kind(LOW, HIGH, **option)


@every
def test_only_what_was_asked_can_be_told(kind: Callable[..., Search]) -> None:
    search = kind(LOW, HIGH, population=4, generations=2)
    with pytest.raises(ConfigError, match="no best point yet"):
        _ = search.best
    with pytest.raises(ConfigError, match="ask for points first"):
        search.tell([1, 2, 3, 4])
    search.ask()
    for wrong in ([1, 2, 3], [1, 2, 3, math.nan]):
        with pytest.raises(ConfigError, match="tell as many numbers"):
            search.tell(wrong)
    search.tell([1, 2, 3, 4])
    assert search.best.fitness == 1


def test_wrong_seed_and_step() -> None:
    for seed in (-1, 1.0, True, "1", (), (1, -1), None, np.random.default_rng(0)):
        with pytest.raises(ConfigError, match="seed must be one or several non-negative"):
            RandomSearch([0], [1], seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="step must be positive"):
        NegativelyCorrelatedSearch([0], [1], step=0)
    with pytest.raises(ConfigError, match="start must hold"):
        NegativelyCorrelatedSearch([0], [1], start=[[1, 2]])
    with pytest.raises(ConfigError, match=r"start must hold finite numbers of shape \[3\]"):
        CmaSearch(LOW, HIGH, start=[0.5])
    with pytest.raises(ConfigError, match="step must be positive"):
        CmaSearch(LOW, HIGH, step=-1)
    with pytest.raises(ConfigError, match="limit must be a number or infinite"):
        NegativelyCorrelatedSearch([0], [1], limit=math.nan)
    with pytest.raises(ConfigError, match="limit and resolution must be numbers"):
        BisectionSearch(LOW, HIGH, limit=math.nan)
    with pytest.raises(ConfigError, match="population of at least 4"):
        CmaSearch([0], [1], population=2)
