"""Mask variables: trained, saved and moved like parameters, and none of the user's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxprune.learning import MaskVariables, Schedule


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.gates = MaskVariables(torch.zeros(3), rate=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight * self.gates.values.sigmoid()).sum()


def test_only_the_model_is_the_users_to_train() -> None:
    assert [name for name, _ in Gated().named_parameters()] == ["weight"]


def test_adam_moves_by_its_rate_at_first() -> None:
    model = Gated()
    model(torch.tensor([1.0, -2.0, 0.0])).backward()
    model.gates.update(model.gates.gradient())
    torch.testing.assert_close(model.gates.values.detach(), torch.tensor([-0.1, 0.1, 0.0]))
    assert model.gates.gradient() is None  # it was taken


def test_sgd_has_momentum_and_bounds() -> None:
    variables = MaskVariables(torch.zeros(2), rate=1.0, rule="sgd", momentum=0.5, bound=1.2)
    for expected in ([-1.0, 0.5], [-1.2, 1.2]):  # the second step is 1.5 times the first
        variables.update(torch.tensor([1.0, -0.5]))
        torch.testing.assert_close(variables.values.detach(), torch.tensor(expected))


def test_gradients_that_are_not_finite_are_dropped() -> None:
    model = Gated()
    model(torch.tensor([1.0, float("nan"), 0.0])).backward()
    model.gates.update(model.gates.gradient())
    assert torch.equal(model.gates.values, torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_stay_leaves_in_wide_precision(dtype: torch.dtype) -> None:
    model = Gated()
    model(torch.ones(3)).backward()
    model.to(dtype)
    assert model.gates.values.dtype == torch.promote_types(dtype, torch.float32)
    assert model.gates.values.is_leaf and model.gates.values.requires_grad
    assert model.gates.values.grad is not None
    model.gates.update(model.gates.gradient())
    assert bool((model.gates.values < 0).all())


def test_state_continues_bit_for_bit() -> None:
    x = torch.tensor([1.0, -2.0, 0.5])

    def train(model: Gated, steps: int) -> Gated:
        for _ in range(steps):
            model(x).backward()
            model.gates.update(model.gates.gradient())
        return model

    whole = train(Gated(), 5)
    half = train(Gated(), 3)
    other, assigned = Gated(), Gated()
    other.load_state_dict(half.state_dict())
    saved = {name: value.clone() for name, value in half.state_dict().items()}
    assigned.load_state_dict(saved, assign=True)
    copied = copy.deepcopy(half)
    for resumed in (train(other, 2), train(assigned, 2), train(copied, 2)):
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
    assert torch.equal(half.gates.updates, torch.tensor(3.0))  # the copy shares nothing


def test_schedule_is_due_at_both_ends() -> None:
    schedule = Schedule(20, 0.25, 0.6)
    assert [s for s in range(21) if schedule.due(s, 3)] == [5, 8, 11, 12]
    assert [schedule.progress(s) for s in (0, 5, 12, 20)] == [0.0, 0.0, 1.0, 1.0]
    assert Schedule(1, 0.0, 0.0).last == 1  # something is learned before it ends
