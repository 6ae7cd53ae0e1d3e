"""The budget: what it pulls with, that it ends at its target, and that its state is a buffer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxprune.learning.budget import GAIN, REACH, SHARPNESS, Budget

INITIAL = 1e-3


def pull(budget: Budget, fraction: float) -> float:
    """How hard the penalty pulls on the logarithm of the cost."""
    logarithm = torch.tensor(fraction, dtype=torch.float64).log().requires_grad_()
    budget.penalty(logarithm.exp()).backward()
    assert logarithm.grad is not None
    return float(logarithm.grad)


def test_it_pulls_by_the_ratio_of_cost_and_goal() -> None:
    budget = Budget(0.1, steps=10)
    assert pull(budget, 1.0) == pytest.approx(INITIAL)
    assert pull(budget, 0.8) == pytest.approx(INITIAL * 0.8**SHARPNESS)
    assert pull(budget, 1.2) == pytest.approx(INITIAL * 1.2**SHARPNESS)
    farthest = INITIAL * math.exp(SHARPNESS * REACH)
    assert pull(budget, 5.0) == pull(budget, 9.0) == pytest.approx(farthest)


def test_goal_falls_by_equal_ratios_and_the_multiplier_by_the_excess() -> None:
    budget = Budget(0.01, steps=10)
    budget.update(1.0, 0.5)
    assert budget.goal == pytest.approx(0.1)
    assert budget.multiplier == pytest.approx(INITIAL)
    budget.update(0.2 * 0.1 / 0.2 * math.exp(0.25), 1.0)
    assert budget.multiplier == pytest.approx(INITIAL * math.exp(0.25 * GAIN / 10))
    assert budget.goal == pytest.approx(0.01)
    before = budget.multiplier
    budget.update(1.0, 1.0)
    assert budget.multiplier == pytest.approx(before * math.exp(REACH * GAIN / 10))


def importance(seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.rand(200, generator=generator, dtype=torch.float64) ** 4


@pytest.mark.parametrize("target", [0.5, 0.05])
@pytest.mark.parametrize("scale", [0.001, 10.0])
def test_a_cost_lands_at_its_target_and_stays(target: float, scale: float) -> None:
    """Gates of different worth: the worth lost and the penalty, descended together."""
    worth = importance(0, scale)
    logits = torch.full((200,), 2.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.075)
    budget = Budget(target, steps=200)
    costs = []
    for step in range(300):
        present = logits.sigmoid()
        fraction = present.mean() ** 2
        loss = -(worth * present).mean() + budget.penalty(fraction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.update(fraction.detach(), min(1.0, (step + 1) / 200))
        costs.append(float(fraction.detach()) / target)
    assert 0.95 < costs[-1] < 1.015
    assert max(costs[-50:]) - min(costs[-50:]) < 0.05


def test_state_resumes_and_keeps_its_precision() -> None:
    first, second = Budget(0.3, steps=10), Budget(0.3, steps=10)
    first.update(1.3, 0.25)
    second.load_state_dict(first.state_dict())
    assert second.multiplier == first.multiplier
    assert second.goal == first.goal
    assert not list(first.parameters())
    value = first.multiplier
    assert first.bfloat16().state.dtype == torch.float64
    assert first.multiplier == pytest.approx(value)
