"""What stage-wise pruning asks of a metric: how much worse than the unpruned model is allowed."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

__all__ = ["Constraint"]

WORST = 1e6
"""Fitness of a candidate whose metric is infinite or NaN; searches calculate with fitnesses."""

ROUNDING = 4 * sys.float_info.epsilon
"""Of the numbers compared: 0.8 - 0.7 is more than 0.1 in floating point."""


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric, measured from the unpruned model's.

    Attributes:
        dense: the metric of the unpruned model.
        goal: whether a metric should be small or large.
        limit: how much worse it may be.
        relative: whether the limit is a fraction of the unpruned model's metric.
    """

    dense: float
    goal: Literal["min", "max"]
    limit: float
    relative: bool

    @property
    def allowed(self) -> float:
        """How much worse a metric may be, in its unit."""
        return self.limit * abs(self.dense) if self.relative else self.limit

    def excess(self, metric: float) -> float:
        """How far a metric is beyond the bound; 0 or less if it is within; infinite for NaN."""
        if math.isnan(metric):
            return math.inf
        worse = metric - self.dense if self.goal == "min" else self.dense - metric
        return worse - self.allowed - ROUNDING * max(abs(self.dense), self.allowed)

    def fitness(self, removed: float, metric: float) -> float:
        """What a search minimizes: minus what is removed within the bound, else over 1.

        Beyond it the fitness is how much worse the metric is in units of what is allowed; where
        nothing is, in units of the unpruned model's metric, from 1.
        """
        excess = self.excess(metric)
        if excess <= 0:
            return -removed
        return min(WORST, 1 + excess / (self.allowed or abs(self.dense) or 1.0))

    def __str__(self) -> str:
        if self.goal == "min":
            return f"at most {self.dense + self.allowed:g}"
        return f"at least {self.dense - self.allowed:g}"
