"""Random search: the yardstick of every other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike

from fxprune.search.base import Array, Search

__all__ = ["RandomSearch"]


class RandomSearch(Search):
    """Draws every point uniformly from the box; arguments as :class:`Search`.

    >>> RandomSearch([0], [2], population=3, generations=1).ask().shape
    (3, 1)
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        *,
        population: int = 8,
        generations: int = 20,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(low, high, population=population, generations=generations, seed=seed)

    def _propose(self) -> Array:
        return self._random.random((self.population, self.low.size))

    def _learn(self, fitnesses: Array) -> None:
        """Nothing."""

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Nothing."""
