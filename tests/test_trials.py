"""Calls to compare on reach what the example leaves at rest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.calls import Call, run_call
from fxprune.errors import VerificationError
from fxprune.masking.insertion import insert_masks
from fxprune.shrinking.compact import compact_program
from fxprune.trials import other_values, trials
from fxprune.verify import verify_programs
from tests.small import Tagger, frames


class Logarithm(nn.Module):
    """Defined for positive inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, time, 3] to [batch, time, 2]."""
        y: Tensor = self.head(x.log())
        return y


class Words(nn.Module):
    """Reads token numbers; nothing about its inputs may vary."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [2, 4] to [2, 4, 3]."""
        y: Tensor = self.embedding(tokens.view(2, 4))
        return y


def calls(model: nn.Module, *inputs: Tensor) -> dict[str, Call]:
    program = fxprune.trace(model, inputs)
    found = trials(program, partial(run_call, program.module()))
    return {trial.label: trial.call for trial in found}


def test_the_example_comes_first_and_all_others_have_other_values() -> None:
    found = calls(Tagger(), torch.zeros(2, 5, 3))
    assert next(iter(found)) == "example" and len(found) == 5
    assert "batch=1, time=1" in found
    for label, ((x,), _) in found.items():
        assert (x == 0).all() if label == "example" else (x != 0).all()


def test_values_stay_where_noise_makes_no_numbers() -> None:
    example = torch.rand(2, 5, 3) + 0.1
    found = calls(Logarithm(), example)
    (x,), _ = [*found.values()][1]
    assert x.shape[0] > 2 and set(x.flatten().tolist()) == set(example.flatten().tolist())


def test_numbers_of_tokens_stay() -> None:
    tokens = torch.tensor([[0, 4, 1, 2], [3, 3, 0, 1]])
    assert [*calls(Words(), tokens)] == ["example"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_has_the_deviation_of_the_values(dtype: torch.dtype) -> None:
    x = (3 + 0.01 * torch.randn(1000)).to(dtype)
    ((moved, again), _) = other_values(((x, torch.full((1000,), 7.0)), {}))
    assert moved.dtype == dtype
    change = (moved.double() - x.double()).std()
    assert change == pytest.approx(float(x.double().std()), rel=0.1)
    assert float(again.std()) == pytest.approx(1, rel=0.1)


def test_random_numbers_of_others_are_left_alone() -> None:
    before = torch.get_rng_state()
    other_values(((frames(),), {}))
    assert torch.equal(before, torch.get_rng_state())


def test_a_wrong_column_is_found_though_the_example_is_zero() -> None:
    program = fxprune.trace(Tagger(), torch.zeros(2, 5, 3))
    neurons = analyze(program)
    program = replace(program, masks=program.masks.cut_neurons(neurons.group("rnn.l0").neurons[:3]))
    small = compact_program(program, neurons)
    module = small.program.module()
    wrong = fx.GraphModule(module, module.graph)
    state: dict[str, Any] = {n: p.detach().clone() for n, p in module.named_parameters()}
    state["stem.weight"][0, 0] += 1
    functional_call = torch.func.functional_call
    wrong.forward = lambda *args: functional_call(module, state, args)
    masked = insert_masks(program, neurons).module()
    assert verify_programs(program, masked, small, module).max_abs_error < 1e-6
    with pytest.raises(VerificationError) as caught:
        verify_programs(program, masked, small, wrong)
    assert not caught.value.where.endswith("example")
