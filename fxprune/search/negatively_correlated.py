"""Negatively correlated search: parallel hill climbers that keep away from each other.

Source: Tang, Yang, Yao, "Negatively correlated search as a parallel exploration search strategy",
JSAC 2016; constrained as in Li et al., TNNLS 2022, doi 10.1109/tnnls.2022.3184730.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fxprune.errors import ConfigError
from fxprune.search.base import Array, Search

__all__ = ["NegativelyCorrelatedSearch"]


class NegativelyCorrelatedSearch(Search):
    """Moves each searcher to its trial if that is good, or far from where the others look.

    With ``f*`` the best fitness so far, a searcher at ``x`` moves to its trial ``u`` if::

        lambda * D(u) / (D(x) + D(u))  >  (f(u) - f*) / ((f(x) - f*) + (f(u) - f*))

    where ``D`` is the smallest Bhattacharyya distance of its normal distribution, around ``x`` or
    ``u``, to those of the others, and ``lambda ~ N(1, s^2)`` with ``s`` falling linearly from 0.1
    to 0. A quotient 0/0 counts as one half. The first generation evaluates the starts.

    With a ``limit``, which stands for a constraint, a searcher whose fitness is within it never
    leaves it; one that starts outside moves freely until it is inside.

    Args:
        low: lower bounds, [d].
        high: upper bounds, [d].
        population: number of searchers.
        generations: how many times to ask.
        seed: one or several non-negative integers.
        start: where the searchers start, [population, d], or [d] for all; None draws uniformly.
        step: the first standard deviation of trials, as a fraction of the width of the box.
        limit: the largest fitness allowed; infinite for none.
        factor: every ``population`` generations the step of a searcher is divided by it where
            more than a fifth of its trials were taken, multiplied where fewer were.
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        *,
        population: int = 8,
        generations: int = 20,
        seed: int | Sequence[int] = 0,
        start: ArrayLike | None = None,
        step: float = 0.05,
        limit: float = math.inf,
        factor: float = 0.99,
    ) -> None:
        super().__init__(low, high, population=population, generations=generations, seed=seed)
        if not (0 < step < math.inf and 0 < factor <= 1):
            raise ConfigError(
                f"step must be positive and factor in (0, 1], got {step!r} and {factor!r}"
            )
        if math.isnan(limit):
            raise ConfigError("limit must be a number or infinite, got nan")
        shape = (population, self.low.size)
        self.limit, self.factor = limit, factor
        self._places: Array = (
            self._random.random(shape)
            if start is None
            else np.broadcast_to(self._starts(start, shape, shape[1:]), shape)
        )
        self._steps: Array = np.full(shape, float(step))
        self._fitnesses: Array = np.full(population, np.inf)
        self._successes: Array = np.zeros(population)
        self._trials: Array = self._places

    def _propose(self) -> Array:
        if self.generation:
            noise = self._random.standard_normal(self._places.shape)
            self._trials = (self._places + self._steps * noise).clip(0, 1)
        return self._trials

    def _learn(self, fitnesses: Array) -> None:
        if self.generation == 0:
            self._fitnesses = fitnesses.copy()
            return
        badness = _share(fitnesses - self.best.fitness, self._fitnesses - self.best.fitness)
        distance = _share(self._distances(self._trials), self._distances(self._places))
        spread = 0.1 * (1 - self.generation / self.generations)
        taken = self._random.normal(1, spread, self.population) * distance > badness
        taken &= (fitnesses <= self.limit) | (self._fitnesses > self.limit)
        self._places = np.where(taken[:, None], self._trials, self._places)
        self._fitnesses = np.where(taken, fitnesses, self._fitnesses)
        self._successes = self._successes + taken
        if self.generation % self.population == 0:
            self._adapt()

    def _distances(self, centres: Array) -> Array:
        """Each searcher's distance to the nearest other if it stood at its centre, [population]."""
        if self.population == 1:
            return np.zeros(1)
        squares = self._steps**2
        mean = (squares[:, None] + squares[None, :]) / 2  # [n, n, d]
        apart = (centres[:, None] - self._places[None, :]) ** 2 / mean
        logs = np.log(mean) - (np.log(squares)[:, None] + np.log(squares)[None, :]) / 2
        distances: Array = apart.sum(2) / 8 + logs.sum(2) / 2
        np.fill_diagonal(distances, np.inf)
        nearest: Array = distances.min(1)
        return nearest

    def _adapt(self) -> None:
        rate = self._successes / self.population
        change = np.where(rate > 0.2, 1 / self.factor, np.where(rate < 0.2, self.factor, 1.0))
        self._steps = self._steps * change[:, None]
        self._successes = np.zeros(self.population)

    def _own_state(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}").tolist() for name in _REMEMBERED}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        for name in _REMEMBERED:
            setattr(self, f"_{name}", np.array(state[name], np.float64))


_REMEMBERED = ("places", "steps", "fitnesses", "successes", "trials")


def _share(part: Array, rest: Array) -> Array:
    """``part / (part + rest)`` of non-negative numbers, infinite ones and zeros included."""
    both, none = np.isinf(part) & np.isinf(rest), (part == 0) & (rest == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(np.isinf(part), 1.0, part / (part + rest))
    result: Array = np.where(both | none, 0.5, share)
    return result
