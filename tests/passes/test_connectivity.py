"""Sparse connectivity learning: what whole trainings come to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.masking.gating import mask_module_name
from fxprune.passes import Magnitude, SparseConnectivity
from fxprune.passes._connectivity_masks import ON, ConnectionMask
from fxprune.pipeline import run_passes
from fxprune.preparing import Prepared
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from tests.laws import assert_same
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

TOTAL = sum(WEIGHTS.values())


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return trace(Tagger(), EXAMPLE)


def mask_of(prepared: Prepared, weight: str) -> ConnectionMask:
    found = prepared.module.get_submodule(mask_module_name(weight))
    assert isinstance(found, ConnectionMask)
    return found


def train(prepared: Prepared, batches: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    for batch in batches:
        loss = mse(prepared.module, batch) + prepared.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prepared.step()


# Whole trainings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["connection", "filter"])
@pytest.mark.parametrize("target", [0.5, 0.1, 4 / TOTAL])
def test_the_target_is_met(program: Program, target: float, structure: Any) -> None:
    chosen = SparseConnectivity(target=target, structure=structure)
    masks = prune(program, chosen, task=make_task()).program.masks.connections
    kept = sum(int(masks[n].sum()) if n in masks else size for n, size in WEIGHTS.items())
    allowed = TOTAL - math.floor((1 - target) * TOTAL + 1e-9)
    if structure == "connection":
        assert kept == allowed
    else:
        assert allowed - 6 < kept <= allowed + 4 * 6
    assert all(bool(m.any()) for m in masks.values())


@pytest.mark.parametrize("structure", ["connection", "filter"])
def test_the_target_is_met_where_all_variables_are_equal(program: Program, structure: Any) -> None:
    chosen = SparseConnectivity(target=0.5, structure=structure)
    prepared = fxprune.prepare(program, chosen, steps=1)
    (prepared.module(BATCHES[0]).sum() * 0.0).backward()
    prepared.step()
    kept = sum(mask_of(prepared, name).kept() for name in WEIGHTS)
    assert 0.4 * TOTAL < kept <= 0.5 * TOTAL + 6 + 5 + 5  # the last weights keep a filter each
    if structure == "connection":
        assert kept == TOTAL - TOTAL // 2


def test_a_price_removes_more_the_higher_it_is(program: Program) -> None:
    kept = []
    for penalty in (0.0, 0.02, 0.1):
        chosen = SparseConnectivity(penalty=penalty, rate=5.0)
        masks = prune(program, chosen, task=make_task()).program.masks.connections
        kept.append(sum(int(masks[n].sum()) if n in masks else s for n, s in WEIGHTS.items()))
    assert TOTAL >= kept[0] > kept[1] > kept[2] > 0


def test_connections_return(program: Program) -> None:
    """Some that were off after half of the learning are on in the end."""
    prepared = fxprune.prepare(program, SparseConnectivity(penalty=0.05), steps=64)
    optimizer = torch.optim.SGD(prepared.module.parameters(), lr=0.05)
    train(prepared, BATCHES * 3, optimizer)
    before = {n: mask_of(prepared, n).values > 0 for n in WEIGHTS}
    train(prepared, BATCHES * 3, optimizer)
    returned = sum(int((~before[n] & (mask_of(prepared, n).values > 0)).sum()) for n in WEIGHTS)
    assert returned > 0


def test_each_weight_keeps_a_connection(program: Program) -> None:
    """The gradient of a weight that nothing reads is 0: the price alone decides."""
    prepared = fxprune.prepare(program, SparseConnectivity(penalty=0.01, end=1.0), steps=50)
    stem = mask_of(prepared, "stem.weight")
    with torch.no_grad():
        prepared.module.get_parameter("stem.weight").zero_()
        stem.values.fill_(1e-5)
        stem.values[2, 1] = 2e-5
    mse(prepared.module, BATCHES[0]).backward()
    prepared.step()
    assert stem.kept() == 1
    assert float(stem.values[2, 1].detach()) == pytest.approx(ON)


def test_masks_are_final_in_the_last_part(program: Program) -> None:
    prepared = fxprune.prepare(program, SparseConnectivity(target=0.3, end=0.5), steps=16)
    optimizer = momentum(prepared.module.parameters())
    train(prepared, BATCHES, optimizer)
    final = {n: mask_of(prepared, n).values.clone() for n in WEIGHTS}
    weights = {n: prepared.module.get_parameter(n).detach().clone() for n in WEIGHTS}
    train(prepared, BATCHES, optimizer)
    for name, values in final.items():
        assert torch.equal(mask_of(prepared, name).values, values)
        on = values > 0
        assert bool((prepared.module.get_parameter(name) != weights[name])[on].any())


def test_best_weights_are_of_the_final_masks(program: Program) -> None:
    scores = iter([0.0, 0.1, 3.0, 2.0, 4.0])
    seen: list[dict[str, Tensor]] = []

    def validate(model: nn.Module) -> float:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return next(scores)

    task = make_task(validate=validate)
    after = prune(program, SparseConnectivity(target=0.3, end=0.5), task=task).program
    for name in program.tensors:
        assert torch.equal(after.tensors[name], seen[3][name]), name


def test_same_seed_same_result_and_nothing_else_changes(program: Program) -> None:
    before = {n: t.detach().clone() for n, t in program.tensors.items()}
    state = torch.get_rng_state()
    chosen = SparseConnectivity(target=0.3)
    first, second = (prune(program, chosen, task=make_task()).program for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.masks.same_as(second.masks)
    assert program.masks.empty
    for name, tensor in program.tensors.items():
        assert torch.equal(first.tensors[name], second.tensors[name])
        assert torch.equal(tensor, before[name])
        assert isinstance(first.tensors[name], nn.Parameter)


def test_twice_in_a_row(program: Program) -> None:
    """What the first cut is not counted again, and stays cut."""
    chosen = SparseConnectivity(target=0.5)
    first = prune(program, chosen, task=make_task()).program
    second = prune(first, chosen, task=make_task()).program
    kept = {n: int(second.masks.connections[n].sum()) for n in WEIGHTS}
    half = TOTAL - TOTAL // 2
    assert sum(kept.values()) == half - half // 2
    for name, mask in first.masks.connections.items():
        assert bool((mask >= second.masks.connections[name]).all())


def test_after_neurons_were_cut(program: Program) -> None:
    half = prune(program, Magnitude(0.4, "neuron"), task=make_task()).program
    after = prune(half, SparseConnectivity(target=0.5), task=make_task()).program
    assert torch.equal(after.masks.neurons, half.masks.neurons)
    compact = fxprune.compile(half, SparseConnectivity(target=0.5), task=make_task())
    assert compact.report.sparsity > 0.5


def test_protected_weights_stay_dense(program: Program) -> None:
    outcome = prune(
        program, SparseConnectivity(target=0.2), task=make_task(), protect=("stem.*", "head.*")
    )
    assert set(outcome.program.masks.connections) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert [r.node for r in outcome.refusals] == ["stem.weight", "head.weight"]


def test_frozen_weights_are_masked_and_keep_their_values(program: Program) -> None:
    frozen = nn.Parameter(program.tensors["head.weight"].detach(), requires_grad=False)
    given = replace(program, tensors={**program.tensors, "head.weight": frozen})
    after = prune(given, SparseConnectivity(target=0.3), task=make_task()).program
    assert not bool(after.masks.connections["head.weight"].all())
    assert torch.equal(after.tensors["head.weight"], frozen)


# Precisions and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    prepared = fxprune.prepare(
        Tagger().to(dtype),
        SparseConnectivity(target=0.3),
        example_inputs=BATCHES[0].to(dtype),
        steps=8,
    )
    wide = torch.promote_types(dtype, torch.float32)
    assert mask_of(prepared, "head.weight").values.dtype == torch.float32 or wide == torch.float64
    optimizer = torch.optim.SGD(prepared.module.parameters(), lr=0.05)
    train(prepared, [b.to(dtype) for b in BATCHES], optimizer)
    compact = prepared.convert()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    assert_same(prepared.module.eval(), compact.module.eval(), [BATCHES[0].to(dtype)], tolerance)
    assert sum(mask_of(prepared, name).kept() for name in WEIGHTS) == TOTAL - int(0.7 * TOTAL)
    assert compact.report.sparsity == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 3, 4), (5, 1, 4)])
def test_short_sequences_and_single_examples(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    x = torch.randn(shape)
    prepared = fxprune.prepare(model, SparseConnectivity(target=0.3), example_inputs=x, steps=4)
    assert not prepared.module.training
    train(prepared, [x] * 4, torch.optim.Adam(prepared.module.parameters(), lr=0.01))
    assert_same(prepared.module, prepared.convert().module, [x], 1e-6)
    assert not model.training


# Stopped and continued ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"target": 0.2}, {"penalty": 0.02, "structure": "filter"}])
@pytest.mark.parametrize("at", [1, 7, 14])
def test_a_state_dict_continues_bit_for_bit(
    program: Program, options: dict[str, Any], at: int
) -> None:
    chosen = SparseConnectivity(**options)
    batches = BATCHES * 2

    def begin() -> tuple[Prepared, torch.optim.Optimizer]:
        prepared = fxprune.prepare(program, chosen, steps=16)
        return prepared, torch.optim.Adam(prepared.module.parameters(), lr=0.01, weight_decay=0.1)

    whole, optimizer = begin()
    train(whole, batches, optimizer)
    broken, optimizer = begin()
    train(broken, batches[:at], optimizer)
    resumed, fresh = begin()
    train(resumed, batches[:3], fresh)  # it was somewhere else
    resumed.module.load_state_dict(broken.module.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    train(resumed, batches[at:], fresh)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], tensor), name
    report = whole.convert().report
    assert resumed.convert().report.sparsity == report.sparsity


def test_a_broken_run_continues_where_it_was(program: Program, tmp_path: Path) -> None:
    check_that_it_continues(program, SparseConnectivity(target=0.3), tmp_path)


def test_compile_learns_and_shrinks() -> None:
    torch.manual_seed(0)
    compact = fxprune.compile(
        Tagger(),
        "sparse-connectivity{target=0.1,structure=filter,feature=unit}",
        example_inputs=torch.zeros(4, 2, 4),
        task=make_task(),
        progress=False,
    )
    assert compact.report.sparsity > 0.75
    assert compact.report.parameters_after < compact.report.parameters_before


# What is refused ----------------------------------------------------------------------------------


def test_a_price_that_kills_everything_stops(program: Program, tmp_path: Path) -> None:
    task = make_task(checkpoint=tmp_path, epochs=8)
    chosen = SparseConnectivity(penalty=0.9, rate=0.3, normalize=False)
    with pytest.raises(TrainingError, match="every connection of the model was off after step"):
        prune(program, chosen, task=task)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]  # the last healthy epoch


def test_losses_that_are_not_finite_stop(program: Program) -> None:
    task = make_task(loss=lambda model, batch: mse(model, batch) * math.nan)
    with pytest.raises(TrainingError, match="the loss is nan"):
        prune(program, SparseConnectivity(target=0.3), task=task)


def test_targets_below_a_connection_for_each_weight_are_refused(program: Program) -> None:
    with pytest.raises(PreconditionError, match="keeps 2 of 199 connections, but each of 4 weig"):
        prune(program, SparseConnectivity(target=0.01), task=make_task())


def test_nothing_to_learn_is_refused(program: Program) -> None:
    with pytest.raises(PreconditionError, match=r"nothing to learn \(stem.weight: protected"):
        prune(program, SparseConnectivity(target=0.3), task=make_task(), protect=("*",))


def test_training_is_needed(program: Program) -> None:
    with pytest.raises(PreconditionError, match="it has to train, and there is no task"):
        run_passes(program, [SparseConnectivity(target=0.3)])
    with pytest.raises(ConfigError, match="give steps="):
        fxprune.prepare(program, SparseConnectivity(target=0.3))
