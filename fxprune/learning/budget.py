"""A budget that is met by itself: the multiplier of a penalty, controlled while the model trains.

How strong a penalty must be for half the cost, nobody can guess. So the cost is a constraint,
f <= g for the cost f as a fraction of the dense one, and its multiplier m is found by ascent. Both
are taken in ratios, so that neither the scale of the loss nor a small budget needs other settings:

    penalty = m / k ((f / g)^k - 1),    then  m <- m (f / g)^r  after each step

which is the exponential method of multipliers for the constraint log(f / g) <= 0: the pull on
log f is m (f / g)^k. The goal g falls from 1 to the budget along b^progress, by equal ratios.

Source: Bertsekas, "Constrained optimization and Lagrange multiplier methods", 1982, section 5.1.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxprune.learning.precise import Precise

__all__ = ["Budget"]

SHARPNESS = 12.0
"""k: how much harder the penalty pulls where the cost is above the goal, less where below.

A blunter one overshoots: the multiplier then grows too far before the cost begins to follow.
"""

GAIN = 30.0
"""r, times the steps in which the goal is to be reached."""

REACH = 0.5
"""Largest log(f / g) that is answered to in full: from there on the pull grows no more."""


class Budget(Precise):
    """Keeps a cost at or just under a goal that falls to a budget.

    All that changes lies in one buffer, which ``state_dict`` saves.

    Args:
        target: the budget, as a fraction of the dense cost, in (0, 1).
        steps: optimizer steps until the goal stands at the budget.
        initial: the multiplier before the first step, in units of the loss.

    Example:
        >>> budget = Budget(0.25, steps=100)
        >>> budget.update(0.8, progress=0.5)
        >>> budget.goal
        0.5
        >>> at, above = budget.penalty(torch.tensor(0.5)), budget.penalty(torch.tensor(0.7))
        >>> float(at), bool(above > at)
        (0.0, True)
    """

    state: Tensor

    def __init__(self, target: float, steps: int, initial: float = 1e-3) -> None:
        super().__init__()
        self.target, self.rate = target, GAIN / max(1, steps)
        state = torch.tensor([math.log(initial), 0.0], dtype=torch.float64)
        self.register_buffer("state", state)  # logarithms of the multiplier and of the goal

    @property
    def multiplier(self) -> float:
        """The pull on the logarithm of the cost, while that is at its goal."""
        return math.exp(float(self.state[0]))

    @property
    def goal(self) -> float:
        """The fraction that the cost is to be at now."""
        return math.exp(float(self.state[1]))

    def penalty(self, fraction: Tensor) -> Tensor:
        """What to add to the loss.

        Args:
            fraction: the cost as a fraction of the dense one, a differentiable scalar above 0.
        """
        multiplier, goal = self.state.to(fraction.device).exp().unbind()
        excess = (fraction.double() / goal).log()
        near = excess.clamp(max=REACH)
        grown = torch.expm1(SHARPNESS * near) / SHARPNESS
        beyond = math.exp(SHARPNESS * REACH) * (excess - near)
        return (multiplier * (grown + beyond)).to(fraction.dtype)

    @torch.no_grad()
    def update(self, fraction: float | Tensor, progress: float) -> None:
        """One step of the ascent, after a step of the optimizer.

        Args:
            fraction: the cost now.
            progress: where the goal is to stand next, from 0 (dense) to 1 (the budget).
        """
        excess = math.log(max(float(fraction), 1e-12)) - float(self.state[1])
        self.state[0] += self.rate * max(-REACH, min(REACH, excess))
        self.state[1] = progress * math.log(self.target)
