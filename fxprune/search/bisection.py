"""Bisection on one number that stands for all: how far a constraint lets it go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fxprune.errors import ConfigError
from fxprune.search.base import Array, Search

__all__ = ["BisectionSearch"]


class BisectionSearch(Search):
    """Finds the largest ``t`` whose point has a fitness of at most ``limit``.

    The point of ``t`` has ``t`` in every place, clipped to the bounds: one ratio for all. Each
    generation cuts the bracket into ``population + 1`` equal parts, so that a population of 1
    bisects; a larger one needs more evaluations and fewer rounds of waiting. It is exact where the
    fitness passes the limit once; elsewhere the end is still at most ``limit`` where anything was.

    Args:
        low: lower bounds, [d].
        high: upper bounds, [d].
        population: points per generation, evaluated at once.
        generations: at most so many.
        limit: the largest fitness allowed.
        resolution: stop when the bracket is narrower.

    Raises:
        ConfigError: as :class:`Search`, or limit or resolution is NaN.
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        *,
        population: int = 8,
        generations: int = 20,
        limit: float = 0.0,
        resolution: float = 1e-4,
    ) -> None:
        super().__init__(low, high, population=population, generations=generations, seed=0)
        if math.isnan(limit) or math.isnan(resolution):
            raise ConfigError(
                f"limit and resolution must be numbers, got {limit!r} and {resolution!r}"
            )
        self.limit, self.resolution = limit, resolution
        self._below, self._above = float(self.low.min()), float(self.high.max())
        self._full = False  # whether the upper end itself was allowed

    @property
    def done(self) -> bool:
        """Whether the budget is spent or the bracket narrow enough; the end is always tried."""
        narrow = self.generation > 0 and self._above - self._below < self.resolution
        return self._full or narrow or self.generation >= self.generations

    def _propose(self) -> Array:
        return self._unit(np.broadcast_to(self._cuts()[:, None], (self.population, self.low.size)))

    def _learn(self, fitnesses: Array) -> None:
        cuts, allowed = self._cuts(), fitnesses <= self.limit
        below = float(cuts[allowed].max()) if allowed.any() else self._below
        beyond = cuts[~allowed & (cuts > below)]
        self._full = not beyond.size and below == self._above
        self._below, self._above = below, float(beyond.min()) if beyond.size else self._above

    def _cuts(self) -> Array:
        """Points inside the bracket; the first time the upper end is one of them."""
        parts = self.population + (self.generation > 0)
        steps = np.arange(1, self.population + 1) / parts
        cuts: Array = self._below + steps * (self._above - self._below)
        if parts == self.population:
            cuts[-1] = self._above
        return cuts

    def _own_state(self) -> dict[str, Any]:
        return {"below": self._below, "above": self._above, "full": self._full}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        self._below, self._above, self._full = state["below"], state["above"], state["full"]
