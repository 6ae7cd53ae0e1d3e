"""CMA-ES by the ``cma`` package, behind the same interface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fxprune.errors import ConfigError
from fxprune.randomness import preserved_random_state
from fxprune.search.base import Array, Search

__all__ = ["CmaSearch"]


class CmaSearch(Search):
    """Covariance matrix adaptation from one start; further arguments as :class:`Search`.

    Its state is what it was told: loading it replays that, since the package's own objects cannot
    be kept without pickle.

    Args:
        start: where to start, [d]; the middle of the box if None.
        step: the first standard deviation, as a fraction of the width of the box.

    Raises:
        ConfigError: the package is not installed, the population or the number of dimensions is
            too small for it, or start or step make no sense.

    Source: Hansen, "The CMA evolution strategy: a tutorial", https://arxiv.org/abs/1604.00772.
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
        step: float = 0.25,
    ) -> None:
        super().__init__(low, high, population=population, generations=generations, seed=seed)
        if population < 4:
            raise ConfigError(f"CMA-ES needs a population of at least 4, got {population}")
        if len(self.low) < 2:
            raise ConfigError(
                "CMA-ES needs at least two numbers to search, got one; BisectionSearch is for that"
            )
        if not 0 < step < math.inf:
            raise ConfigError(f"step must be positive, got {step!r}")
        middle = np.full(self.low.shape, 0.5)
        self._start = middle if start is None else self._starts(start, self.low.shape)
        self._step, self._seed = step, seed
        self._told: list[list[float]] = []
        self._strategy = self._new_strategy()
        self._points: list[Array] = []

    def _new_strategy(self) -> Any:
        try:
            import cma
        except ImportError as error:
            raise ConfigError(
                "the search 'cma' needs the package cma: pip install 'fxprune[search]', or "
                "choose another search"
            ) from error
        draws = np.random.default_rng(self._seed)
        options = {
            "bounds": [0, 1],
            "popsize": self.population,
            "randn": lambda *shape: draws.standard_normal(shape),
            "seed": np.nan,  # leaves numpy's global generator alone
            "verbose": -9,
            "verb_log": 0,
        }
        with preserved_random_state():
            return cma.CMAEvolutionStrategy(self._start, self._step, options)

    def _propose(self) -> Array:
        with preserved_random_state(self.generation):
            self._points = self._strategy.ask()
        return np.array(self._points).clip(0, 1)

    def _learn(self, fitnesses: Array) -> None:
        with preserved_random_state(self.generation):
            self._strategy.tell(self._points, fitnesses.tolist())
        self._told.append(fitnesses.tolist())

    def _own_state(self) -> dict[str, Any]:
        return {"told": [list(values) for values in self._told]}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        generation, self._told = self.generation, []
        self._strategy = self._new_strategy()
        for self.generation, values in enumerate(state["told"]):
            self._propose()
            self._learn(np.array(values))
        self.generation = generation
        if self._asked is not None:
            self._propose()
