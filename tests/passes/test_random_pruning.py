"""Random pruning: counts are those of magnitude pruning, and the weights do not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fxprune.contract import Facts, NeuronAnalysis
from fxprune.errors import ConfigError, PreconditionError
from fxprune.passes import Magnitude, RandomPruning
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from tests.passes.tagging import prune
from tests.zoo import by_name

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


@pytest.fixture(scope="module", params=["lstm-projected-two-layer", "tied-projected-lm"])
def program(request: pytest.FixtureRequest) -> Program:
    known = by_name(request.param)
    return trace(known.build(), known.inputs(known.batch, known.time))


def counts(program: Program, by_weight: bool) -> list[int]:
    """What is gone: of each neuron group, and of each weight or of all weights."""
    masks = program.masks
    gone = [int((~m).sum()) for _, m in sorted(masks.connections.items())]
    groups = Facts(program)[NeuronAnalysis].groups
    cut = [int(torch.isin(g.neurons, masks.neurons).sum()) for g in groups]
    return [*cut, *gone] if by_weight else [sum(cut), sum(gone)]


@pytest.mark.parametrize("structure", ["neuron", "connection"])
@pytest.mark.parametrize("scope", ["group", "class", "global"])
@pytest.mark.parametrize("sparsity", [0.3, 0.95])
def test_as_many_go_as_by_magnitude(
    program: Program, structure: Any, scope: Any, sparsity: float
) -> None:
    random = prune(program, RandomPruning(sparsity, structure, scope, seed=1))
    magnitude = prune(program, Magnitude(sparsity, structure, scope))
    by_weight = scope == "group"
    assert counts(random.program, by_weight) == counts(magnitude.program, by_weight)
    if by_weight:
        assert random.refusals == magnitude.refusals
    assert not random.program.masks.same_as(magnitude.program.masks)


@pytest.mark.parametrize("structure", ["neuron", "connection"])
def test_only_the_seed_decides(program: Program, structure: Any) -> None:
    generator = torch.get_rng_state()
    first = prune(program, RandomPruning(0.5, structure)).program.masks
    tensors = {n: nn.Parameter(t.detach() * 2 + 1) for n, t in program.tensors.items()}
    other_weights = prune(replace(program, tensors=tensors), RandomPruning(0.5, structure))
    other_seed = prune(program, RandomPruning(0.5, structure, seed=1)).program.masks
    assert other_weights.program.masks.same_as(first)
    assert not other_seed.same_as(first)
    assert torch.equal(torch.get_rng_state(), generator)


def test_draws_are_spread_evenly() -> None:
    program = trace(nn.Linear(100, 100), torch.zeros(1, 100))
    keep = prune(program, RandomPruning(0.5, "connection")).program.masks.connections["weight"]
    quarters = keep.double().reshape(2, 50, 2, 50).mean(dim=(1, 3))
    assert torch.allclose(quarters, torch.full((2, 2), 0.5, dtype=torch.float64), atol=0.04)


def test_only_what_is_left_is_drawn_from() -> None:
    program = trace(nn.Linear(10, 10), torch.zeros(1, 10))
    once = prune(program, RandomPruning(0.5, "connection"))
    twice = prune(program, RandomPruning(0.5, "connection"), RandomPruning(0.5, "connection"))
    before, after = (o.program.masks.connections["weight"] for o in (once, twice))
    assert (int(before.sum()), int(after.sum())) == (50, 25)
    assert bool((before >= after).all())


def test_protected_weights_stay() -> None:
    program = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))
    outcome = prune(program, RandomPruning(0.5, "connection"), protect=("0.*",))
    assert set(outcome.program.masks.connections) == {"1.weight"}
    assert [(r.node, r.reason) for r in outcome.refusals] == [("0.weight", "protected")]


def test_nothing_is_asked_of_sparsity_zero() -> None:
    program = trace(nn.Linear(3, 2), torch.zeros(1, 3))
    for structure in ("neuron", "connection"):
        assert prune(program, RandomPruning(0, structure)).program is program


def test_model_without_free_neurons_is_refused_for_neurons_only() -> None:
    program = trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(PreconditionError, match="no neuron of this model may be removed"):
        prune(program, RandomPruning(0.5))
    masks = prune(program, RandomPruning(0.5, "connection")).program.masks
    assert int((~masks.connections["weight"]).sum()) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1},
        {"sparsity": float("nan")},
        {"sparsity": 0.5, "structure": "row"},
        {"sparsity": 0.5, "scope": "all"},
        {"sparsity": 0.5, "seed": -1},
        {"sparsity": 0.5, "seed": 1.0},
        {"sparsity": 0.5, "seed": True},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{list(options)[-1]}' of pass 'random-pruning' must"):
        RandomPruning(**options)
