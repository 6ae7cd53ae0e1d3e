"""What all searches have in common: a box, a budget, the best point, and a state to save."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fxprune.errors import ConfigError

__all__ = ["Array", "Best", "Search"]

Array = NDArray[np.float64]


class Best(NamedTuple):
    """The best point told so far; the earliest among equals."""

    point: Array
    fitness: float


class Search(ABC):
    """Minimizes a function that only its user can evaluate.

    Everything drawn comes from a generator of the search's own, so a search is determined by its
    arguments and by what it is told. Subclasses work in the unit cube; points are in the box.

    Args:
        low: lower bounds, [d].
        high: upper bounds, [d]; equal to the lower ones where a number is fixed.
        population: points per generation.
        generations: how many times to ask; ``population * generations`` evaluations in all.
        seed: one or several non-negative integers.

    Raises:
        ConfigError: bounds, population, generations or seed make no sense.
    """

    def __init__(
        self,
        low: ArrayLike,
        high: ArrayLike,
        *,
        population: int,
        generations: int,
        seed: int | Sequence[int],
    ) -> None:
        self.low, self.high = np.array(low, np.float64), np.array(high, np.float64)
        if self.low.ndim != 1 or self.low.shape != self.high.shape or not self.low.size:
            raise ConfigError(
                "the bounds of a search must be two lists of equally many numbers, got shapes "
                f"{self.low.shape} and {self.high.shape}"
            )
        if not (np.isfinite(self.low) & np.isfinite(self.high) & (self.low <= self.high)).all():
            raise ConfigError(
                f"the bounds of a search must be finite and in order, got {low!r} and {high!r}"
            )
        for name, number in (("population", population), ("generations", generations)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {number!r}")
        self.population, self.generations = population, generations
        self.generation = 0
        seeds = seed if isinstance(seed, Sequence) else [seed]
        if not seeds or not all(type(s) is int and s >= 0 for s in seeds):
            # numpy would take None as well, and draw other points each time
            raise ConfigError(f"seed must be one or several non-negative integers, got {seed!r}")
        self._random = np.random.default_rng(seed)
        self._asked: Array | None = None
        self._best: Best | None = None

    @property
    def done(self) -> bool:
        """Whether the budget is spent, or nothing is left to try."""
        return self.generation >= self.generations

    @property
    def best(self) -> Best:
        """The best point so far.

        Raises:
            ConfigError: nothing has been told yet.
        """
        if self._best is None:
            raise ConfigError("this search has no best point yet: tell it some fitnesses first")
        return self._best

    def ask(self) -> Array:
        """The points to evaluate next, [population, d]; the same ones until they are told."""
        if self._asked is None:
            self._asked = self._box(self._propose())
        return self._asked.copy()

    def tell(self, fitnesses: Sequence[float] | Array) -> None:
        """Takes the fitnesses of the points asked for, in their order; lower is better.

        Raises:
            ConfigError: nothing was asked, or there is not one number for each point.
        """
        if self._asked is None:
            raise ConfigError("nothing to tell: ask for points first, and tell them once")
        values = np.array(fitnesses, np.float64)
        if values.shape != (len(self._asked),) or np.isnan(values).any():
            raise ConfigError(
                f"{len(self._asked)} points were asked for, so tell as many numbers that are not "
                f"NaN, not {fitnesses!r}"
            )
        first = int(values.argmin())
        if self._best is None or values[first] < self._best.fitness:
            self._best = Best(self._asked[first].copy(), float(values[first]))
        self._learn(values)
        self._asked = None
        self.generation += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, in plain numbers, texts, lists and dicts."""
        best = self._best
        return {
            "generation": self.generation,
            "asked": None if self._asked is None else self._asked.tolist(),
            "best": None if best is None else [best.point.tolist(), best.fitness],
            "random": copy.deepcopy(dict(self._random.bit_generator.state)),
            "own": self._own_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of a search that was made with the same arguments."""
        self.generation = state["generation"]
        self._asked = None if state["asked"] is None else np.array(state["asked"])
        best = state["best"]
        self._best = None if best is None else Best(np.array(best[0]), best[1])
        self._random.bit_generator.state = copy.deepcopy(state["random"])
        self._load_own_state(state["own"])

    def _box(self, unit: Array) -> Array:
        """Points of the unit cube in the box; rounding never leaves it."""
        points: Array = np.clip(self.low + unit * (self.high - self.low), self.low, self.high)
        return points

    def _unit(self, points: Array) -> Array:
        """Points of the box in the unit cube; 0 where the box has no width."""
        width = self.high - self.low
        unit: Array = np.where(width > 0, (points - self.low) / np.where(width > 0, width, 1), 0)
        return unit.clip(0, 1)

    def _starts(self, start: ArrayLike, *shapes: tuple[int, ...]) -> Array:
        """Points to start from, of one of some shapes, in the unit cube.

        Raises:
            ConfigError: another shape, or numbers that are not finite.
        """
        given = np.array(start, np.float64)
        if given.shape not in shapes or not np.isfinite(given).all():
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ConfigError(f"start must hold finite numbers of shape {wanted}, got {start!r}")
        return self._unit(given)

    @abstractmethod
    def _propose(self) -> Array:
        """The next points, [population, d], in the unit cube."""

    @abstractmethod
    def _learn(self, fitnesses: Array) -> None:
        """Takes the fitnesses [population] of the points proposed last."""

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What a subclass remembers, in plain values."""

    @abstractmethod
    def _load_own_state(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
