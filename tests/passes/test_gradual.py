"""Gradual magnitude pruning: exactly on schedule, and what is masked stays masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.passes import GradualMagnitude, Magnitude
from fxprune.pipeline import run_passes
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from tests.passes.tagging import (
    BATCHES,
    EXAMPLE,
    WEIGHTS,
    Tagger,
    check_that_it_continues,
    make_task,
    momentum,
    mse,
    prune,
)

CLASSES = {
    "stem.weight": "feedforward",
    "rnn.weight_ih_l0": "input",
    "rnn.weight_hh_l0": "recurrent",
    "head.weight": "feedforward",
}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return trace(Tagger(), EXAMPLE)


def recording(steps: list[dict[str, Tensor]]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The loss; keeps the weights that each step met."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        state = dict(model.named_parameters())
        steps.append({n: state[n].detach().clone() for n in WEIGHTS})
        return mse(model, batch)

    return loss


def test_masks_follow_the_cubic(program: Program) -> None:
    met: list[dict[str, Tensor]] = []
    gradual = GradualMagnitude(0.8, initial=0.1, start=0.25, end=0.75, every=4)
    outcome = prune(program, gradual, task=make_task(loss=recording(met)))
    assert len(met) == 32
    for step, weights in enumerate(met):
        # Rebuilt at 8, 12, 16, 20 and 24, and fixed in between.
        last = min(24, step // 4 * 4)
        sparsity = 0.8 + (0.1 - 0.8) * (1 - (last - 8) / 16) ** 3 if step >= 8 else 0.0
        for name, size in WEIGHTS.items():
            zeros = int((weights[name] == 0).sum())
            assert zeros == math.floor(sparsity * size + 1e-9), (step, name)
    for name, keep in outcome.program.masks.connections.items():
        final = outcome.program.tensors[name]
        assert torch.equal(final != 0, keep), name
    assert set(outcome.program.masks.connections) == set(WEIGHTS)


def test_the_end_counts_where_it_falls_between_rebuildings(program: Program) -> None:
    gradual = GradualMagnitude(0.5, end=0.5, every=1000)
    masks = prune(program, gradual, task=make_task(epochs=1)).program.masks.connections
    assert {n: int((~m).sum()) for n, m in masks.items()} == {n: s // 2 for n, s in WEIGHTS.items()}


def test_what_is_masked_never_returns(program: Program) -> None:
    met: list[dict[str, Tensor]] = []
    prune(program, GradualMagnitude(0.9, every=1), task=make_task(loss=recording(met)))
    for earlier, later in pairwise(met):
        for name in WEIGHTS:
            assert bool((later[name][earlier[name] == 0] == 0).all())


def test_a_weight_that_becomes_zero_takes_no_place_of_a_masked_one(program: Program) -> None:
    name = "rnn.weight_hh_l0"
    kept: list[dict[str, Tensor]] = []

    def thresholding(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Sets small weights to 0, as an optimizer with an L1 term does."""
        optimizer = momentum(parameters)
        held = optimizer.param_groups[0]["params"]

        def shrink(*_: Any) -> None:
            with torch.no_grad():
                for parameter in held:
                    parameter[parameter.abs() < 0.9] = 0

        optimizer.register_step_post_hook(shrink)
        return optimizer

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        masks = {n: b for n, b in model.named_buffers() if n.startswith("_gradual_keep")}
        kept.append({n: b.clone() for n, b in masks.items()})
        return mse(model, batch)

    late = torch.full_like(program.tensors[name], 0.8)
    late[-4:] = 1e-3  # goes first
    start = replace(program, tensors={**program.tensors, name: nn.Parameter(late)})
    task = make_task(loss=loss, optimizer=thresholding)
    prune(start, GradualMagnitude(0.6, initial=0.2, every=2), task=task)
    for earlier, later in pairwise(kept):
        for number, keep in later.items():
            assert not bool((keep & ~earlier[number]).any())


def test_smallest_go_at_each_rebuilding(program: Program) -> None:
    met: list[dict[str, Tensor]] = []
    task = make_task(loss=recording(met), steps=2, epochs=None)
    masks = prune(program, GradualMagnitude(0.5, end=0.5, every=1), task=task).program.masks
    for name, size in WEIGHTS.items():
        # The first step is dense; the mask is made of what it left.
        gone = ~masks.connections[name]
        assert torch.equal(gone, met[1][name] == 0)
        assert int(gone.sum()) == size // 2


def test_masked_weights_get_no_gradient(program: Program) -> None:
    norms = []

    def clipped(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        held = list(parameters)
        optimizer = torch.optim.SGD(held, lr=0.1)

        def look(*_: Any) -> None:
            weights = [p for p in held if p.dim() > 1]
            norms.append(
                sum(int((p.grad[p == 0] != 0).sum()) for p in weights if p.grad is not None)
            )

        optimizer.register_step_pre_hook(look)
        return optimizer

    gradual = GradualMagnitude(0.5, initial=0.5, every=1)
    prune(program, gradual, task=make_task(optimizer=clipped, epochs=1))
    assert norms == [0] * 8


def test_classes_end_at_their_own_sparsity(program: Program) -> None:
    gradual = GradualMagnitude(0.9, recurrent=0.2, input=0.5)
    masks = prune(program, gradual, task=make_task()).program.masks.connections
    final = {"feedforward": 0.9, "input": 0.5, "recurrent": 0.2}
    for name, size in WEIGHTS.items():
        assert int((~masks[name]).sum()) == math.floor(final[CLASSES[name]] * size + 1e-9)


def test_best_weights_at_the_final_sparsity_are_kept(program: Program) -> None:
    """Epoch 2 of 4 is the first at the final sparsity; earlier ones look better, and are not it."""
    scores = iter([0.0, 0.1, 3.0, 2.0, 4.0])
    seen: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> float:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return next(scores)

    gradual = GradualMagnitude(0.8, end=0.5, every=1)
    task = make_task(validate=validate, patience=1)
    after = prune(program, gradual, task=task).program
    assert len(seen) == 5
    for name in program.tensors:
        assert torch.equal(after.tensors[name], seen[3][name]), name


def test_where_more_is_better_the_ramp_does_not_count_either(program: Program) -> None:
    scores = iter([9.0, 8.0, 1.0, 2.0, 1.5])
    task = make_task(validate=lambda _: next(scores), goal="max")
    masks = prune(program, GradualMagnitude(0.8, end=0.5, every=1), task=task).program.masks
    gone = {n: int((~m).sum()) for n, m in masks.connections.items()}
    assert gone == {n: math.floor(0.8 * size + 1e-9) for n, size in WEIGHTS.items()}


def test_earlier_masks_stay_and_are_not_counted(program: Program) -> None:
    half = prune(program, Magnitude(0.5, "connection"), task=make_task()).program
    after = prune(half, GradualMagnitude(0.5), task=make_task()).program.masks.connections
    for name, size in WEIGHTS.items():
        assert bool((half.masks.connections[name] >= after[name]).all())
        left = size - size // 2
        assert int(after[name].sum()) == left - left // 2


def test_protected_weights_train_and_stay_dense(program: Program) -> None:
    outcome = prune(program, GradualMagnitude(0.5), task=make_task(), protect=("stem.*",))
    assert "stem.weight" not in outcome.program.masks.connections
    assert [(r.node, r.reason) for r in outcome.refusals] == [("stem.weight", "protected")]
    assert not torch.equal(outcome.program.tensors["stem.weight"], program.tensors["stem.weight"])


def test_frozen_weights_are_masked_and_keep_their_values(program: Program) -> None:
    frozen = nn.Parameter(program.tensors["head.weight"].detach(), requires_grad=False)
    given = replace(program, tensors={**program.tensors, "head.weight": frozen})
    after = prune(given, GradualMagnitude(0.5), task=make_task()).program
    keep = after.masks.connections["head.weight"]
    assert torch.equal(after.tensors["head.weight"], frozen * keep)
    assert not after.tensors["head.weight"].requires_grad


def test_same_seed_same_result_and_nothing_else_changes(program: Program) -> None:
    before = {n: t.detach().clone() for n, t in program.tensors.items()}
    state = torch.get_rng_state()
    first, second = (
        prune(program, GradualMagnitude(0.7), task=make_task()).program for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.masks.same_as(second.masks)
    for name, tensor in program.tensors.items():
        assert torch.equal(first.tensors[name], second.tensors[name])
        assert torch.equal(tensor, before[name])
        assert isinstance(first.tensors[name], nn.Parameter)
        assert not first.tensors[name]._backward_hooks


def test_a_broken_run_continues_where_it_was(program: Program, tmp_path: Path) -> None:
    """The masks and the step are in the checkpoint."""
    check_that_it_continues(program, GradualMagnitude(0.8, every=3), tmp_path)


def test_compile_runs_it_once_and_shrinks() -> None:
    torch.manual_seed(0)
    compact = fxprune.compile(
        Tagger(),
        "gradual-magnitude{sparsity=0.95}",
        example_inputs=torch.zeros(4, 2, 4),
        task=make_task(),
        progress=False,
    )
    assert compact.report.sparsity >= 0.9


# What is refused ----------------------------------------------------------------------------------


class Stream:
    """Batches without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(BATCHES)


def test_length_of_the_training_must_be_known(program: Program) -> None:
    with pytest.raises(PreconditionError, match="does not tell how many batches it has"):
        prune(program, GradualMagnitude(0.5), task=make_task(train=Stream()))
    task = make_task(train=Stream(), epochs=None, steps=10)
    masks = prune(program, GradualMagnitude(0.5), task=task).program.masks.connections
    assert {n: int((~m).sum()) for n, m in masks.items()} == {n: s // 2 for n, s in WEIGHTS.items()}


def test_no_training_is_refused(program: Program) -> None:
    with pytest.raises(PreconditionError, match="the task trains for no step"):
        prune(program, GradualMagnitude(0.5), task=make_task(epochs=0))
    with pytest.raises(PreconditionError, match="it has to train, and there is no task"):
        run_passes(program, [GradualMagnitude(0.5)])


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_metrics_that_say_nothing_are_refused(program: Program, broken: float) -> None:
    with pytest.raises(TrainingError, match=r"Task\.validate"):
        prune(program, GradualMagnitude(0.5), task=make_task(validate=lambda m: broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1}, "'sparsity' of pass 'gradual-magnitude' must be a number"),
        ({"recurrent": -0.1}, "'recurrent' of pass 'gradual-magnitude' must be a number"),
        ({"start": 0.9, "end": 0.5}, "'start' and 'end' of pass 'gradual-magnitude'"),
        ({"end": 1.5}, "'start' and 'end' of pass 'gradual-magnitude'"),
        ({"end": float("nan")}, "'end' of pass 'gradual-magnitude' must be a number"),
        ({"every": 0}, "'every' of pass 'gradual-magnitude' must be an integer"),
        ({"initial": 0.6}, "'initial' of pass 'gradual-magnitude' is 0.6, more than 'sparsity'"),
        ({"initial": 0.3, "input": 0.2}, "is 0.3, more than 'input'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradualMagnitude(**({"sparsity": 0.5} | options))
