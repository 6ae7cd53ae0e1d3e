"""Sensitivity pruning against thresholds and gradients computed the slow way."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.contract import Facts, NeuronAnalysis
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.masking.masks import Masks
from fxprune.passes import Magnitude, Sensitivity
from fxprune.program import Program, Refusal
from fxprune.tracing.tracer import trace
from fxprune.training import Task
from tests.passes.tagging import prune

WEIGHTS = ("stem.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight")


class Tagger(nn.Module):
    """Linear, GRU, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.rnn = nn.GRU(6, 5)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.rnn(torch.tanh(self.stem(x)))[0])
        return self.head(hidden)  # type: ignore[no-any-return]


def mse(model: nn.Module, batch: Tensor) -> Tensor:
    return functional.mse_loss(model(batch), batch[..., :2])


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 3, generator=generator) for _ in range(count)]


def make_task(
    loss: Callable[[nn.Module, Any], Tensor] = mse,
    train: Iterable[Any] | None = None,
    **options: Any,
) -> Task:
    given = batches() if train is None else train
    return Task(loss, given, lambda m: float(mse(m, batches(1)[0])), goal="min", **options)


@pytest.fixture(scope="module")
def model() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


@pytest.fixture(scope="module")
def tagger(model: Tagger) -> Program:
    return trace(model, torch.zeros(4, 2, 3))


def with_weight(program: Program, name: str, value: Tensor) -> Program:
    return replace(program, tensors={**program.tensors, name: nn.Parameter(value)})


# By the spread of the weights ---------------------------------------------------------------------


def slow_mask(weight: Tensor, threshold: float, floor: float) -> Tensor:
    """The rule word for word, over the entries that are counted."""
    magnitudes = weight.detach().abs().double()
    mean = magnitudes.mean()
    t = threshold * math.sqrt(float(((magnitudes - mean) ** 2).mean()))
    while float((magnitudes >= t).double().mean()) < floor:
        t *= 0.99
    return magnitudes >= t


@pytest.mark.parametrize(("threshold", "floor"), [(2, 0.05), (1, 0), (3.754, 0.01), (3, 0.4)])
def test_threshold_is_the_spread_of_each_matrix(
    tagger: Program, threshold: float, floor: float
) -> None:
    # A heavy tail, as trained weights have: some matrices pass the threshold, some do not.
    program = with_weight(tagger, "rnn.weight_hh_l0", torch.randn(15, 5) ** 3)
    masks = prune(program, Sensitivity(threshold=threshold, floor=floor)).program.masks
    for name in WEIGHTS:
        expected = slow_mask(program.tensors[name], threshold, floor)
        keep = masks.connections.get(name, torch.ones_like(expected))
        assert torch.equal(keep, expected), name
    assert set(masks.connections) <= set(WEIGHTS)  # biases stay


def test_floor_is_reported(tagger: Program) -> None:
    outcome = prune(tagger, Sensitivity(threshold=100, floor=0.2))
    kept = outcome.program.masks.connections["rnn.weight_hh_l0"].double().mean()
    assert 0.2 <= kept < 0.25
    assert (
        Refusal(
            "rnn.weight_hh_l0",
            f"the floor kept {kept:.2%} of it; the threshold alone would have kept 0.00%",
        )
        in outcome.refusals
    )
    assert not prune(tagger, Sensitivity(threshold=0.5)).refusals


def test_published_setting() -> None:
    assert Sensitivity.published() == Sensitivity("std", threshold=3.754, floor=0.01)
    assert (Sensitivity().threshold, Sensitivity().floor) == (2, 0.05)


def test_mostly_zero_and_constant_matrices_end(tagger: Program) -> None:
    sparse = torch.zeros(15, 5)
    sparse[0, 0] = 1
    program = with_weight(tagger, "rnn.weight_hh_l0", sparse)
    program = with_weight(program, "stem.weight", torch.ones(6, 3))
    masks = prune(program, Sensitivity(threshold=2, floor=0.5)).program.masks
    assert "rnn.weight_hh_l0" not in masks.connections  # the floor reaches into the zeros
    assert "stem.weight" not in masks.connections  # no spread, no threshold
    masks = prune(program, Sensitivity(threshold=2, floor=0.01)).program.masks
    assert torch.equal(masks.connections["rnn.weight_hh_l0"], sparse.bool())


@pytest.mark.parametrize(
    ("scale", "threshold", "floor", "kept"),
    [
        (1e9, 1e305, 0.25, 5),  # the threshold itself is infinite
        (5e-324, 2, 0.25, 5),  # among the smallest numbers there are, 0.99 t is t
        (1, 100, 1e-15, 1),  # a floor of less than one connection is one
    ],
)
def test_extreme_thresholds_end_at_the_floor(
    tagger: Program, scale: float, threshold: float, floor: float, kept: int
) -> None:
    weight = torch.arange(18, 0, -1, dtype=torch.float64).reshape(6, 3) * scale
    weight[0, 0] = max(1, 18 * scale)
    program = with_weight(tagger, "stem.weight", weight)
    masks = prune(program, Sensitivity(threshold=threshold, floor=floor)).program.masks
    assert masks.connections["stem.weight"].flatten().tolist() == [i < kept for i in range(18)]


def test_threshold_counts_what_is_left(tagger: Program) -> None:
    half = prune(tagger, Magnitude(0.5, "connection")).program
    masks = prune(half, Sensitivity(threshold=6, floor=0.01)).program.masks
    name = "rnn.weight_ih_l0"
    left = half.masks.connections[name]
    kept = slow_mask(tagger.tensors[name][left], 6, 0.01)
    assert torch.equal(masks.connections[name][left], kept)
    assert not bool(masks.connections[name][~left].any())


def test_weights_that_are_not_finite_stay(tagger: Program) -> None:
    weight = tagger.tensors["stem.weight"].detach().clone()
    weight[0, 0] = torch.nan
    outcome = prune(with_weight(tagger, "stem.weight", weight), Sensitivity())
    assert "stem.weight" not in outcome.program.masks.connections
    assert Refusal("stem.weight", "it has values that are not finite") in outcome.refusals


# By the gradient ----------------------------------------------------------------------------------


def slow_scores(model: nn.Module, loss: Any, data: Iterable[Any]) -> dict[str, Tensor]:
    model = copy.deepcopy(model).eval()
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.dim() > 1}
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        for name, parameter in model.named_parameters():
            if name in sums and parameter.grad is not None:
                sums[name] += (parameter.detach() * parameter.grad).abs()
    return sums


def lowest(*scores: Tensor, sparsity: float) -> list[Tensor]:
    """What stays of matrices that compete; where a row goes empty, the best of all rows do."""
    flat = torch.cat([s.flatten() for s in scores])
    goes = math.floor(sparsity * len(flat) + 1e-9)

    def choose(values: Tensor, spared: Tensor) -> list[Tensor]:
        keep = torch.ones(len(flat), dtype=torch.bool)
        keep[values.argsort(stable=True)[:goes]] = False
        parts = (keep | spared).split([s.numel() for s in scores])
        return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]

    keep = choose(flat, torch.zeros(len(flat), dtype=torch.bool))
    if all(bool(k.any(dim=1).all()) for k in keep):
        return keep
    best = torch.cat([functional.one_hot(s.argmax(1), s.shape[1]).flatten() for s in scores]) > 0
    return choose(flat.masked_fill(best, math.inf), best)


def test_lowest_sensitivities_go(model: Tagger, tagger: Program) -> None:
    scores = slow_scores(model, mse, batches(2))
    sensitivity = Sensitivity("gradient", sparsity=0.3, batches=2)
    masks = prune(tagger, sensitivity, task=make_task()).program.masks
    for name in WEIGHTS:
        assert torch.equal(masks.connections[name], lowest(scores[name], sparsity=0.3)[0]), name


def test_global_scope_compares_all_weights(model: Tagger, tagger: Program) -> None:
    scores = slow_scores(model, mse, batches())
    sensitivity = Sensitivity("gradient", sparsity=0.2, scope="global")
    masks = prune(tagger, sensitivity, task=make_task()).program.masks
    expected = lowest(*(scores[n] for n in WEIGHTS), sparsity=0.2)
    for name, keep in zip(WEIGHTS, expected, strict=True):
        assert torch.equal(masks.connections.get(name, torch.ones_like(keep)), keep), name


@pytest.mark.parametrize("scope", ["group", "class", "global"])
def test_no_row_starves(model: Tagger, tagger: Program, scope: Any) -> None:
    scores = slow_scores(model, mse, batches())
    outcome = prune(tagger, Sensitivity("gradient", sparsity=0.99, scope=scope), task=make_task())
    for name in WEIGHTS:
        keep = outcome.program.masks.connections[name]
        best = functional.one_hot(scores[name].argmax(dim=1), keep.shape[1]).bool()
        assert torch.equal(keep, best), name
    reason = r"kept the best connection of (\d+) rows that would have gone empty"
    told = {r.node: re.fullmatch(reason, r.reason) for r in outcome.refusals}
    assert told["rnn.weight_hh_l0"] is not None
    assert 12 <= int(told["rnn.weight_hh_l0"][1]) <= 15


def test_rows_may_starve_where_the_user_says_so(model: Tagger, tagger: Program) -> None:
    scores = slow_scores(model, mse, batches())["rnn.weight_hh_l0"].flatten()
    sensitivity = Sensitivity("gradient", sparsity=0.96, row_floor=False)
    outcome = prune(tagger, sensitivity, task=make_task())
    keep = outcome.program.masks.connections["rnn.weight_hh_l0"].flatten()
    assert set(keep.nonzero().flatten().tolist()) == set(scores.topk(75 - 72).indices.tolist())
    assert outcome.refusals == ()


def test_others_go_in_place_of_the_last_of_a_row(tagger: Program) -> None:
    weight = torch.ones(15, 5)
    weight[3] = 1e-6  # the reset gate of one unit
    program = with_weight(tagger, "rnn.weight_hh_l0", weight)
    sensitivity = Sensitivity("gradient", sparsity=0.6)
    masks = prune(program, sensitivity, task=make_task()).program.masks
    keep = masks.connections["rnn.weight_hh_l0"]
    assert int(keep[3].sum()) == 1
    assert int((~keep).sum()) == 45


def test_row_of_zeros_keeps_one(tagger: Program) -> None:
    weight = torch.ones(15, 5)
    weight[3] = 0
    program = with_weight(tagger, "rnn.weight_hh_l0", weight)
    sensitivity = Sensitivity("gradient", sparsity=0.2)
    outcome = prune(program, sensitivity, task=make_task())
    assert outcome.program.masks.connections["rnn.weight_hh_l0"][3].tolist() == [0, 0, 0, 0, 1]


def test_gradients_are_of_the_masked_program(tagger: Program, model: Tagger) -> None:
    hidden = Facts(tagger)[NeuronAnalysis].group("stem").neurons
    cut = replace(tagger, masks=Masks(neurons=hidden[:2]))
    without = copy.deepcopy(model)
    with torch.no_grad():  # what cutting two stem neurons amounts to
        without.get_parameter("rnn.weight_ih_l0")[:, :2] = 0
    scores = slow_scores(without, mse, batches())
    sensitivity = Sensitivity("gradient", sparsity=0.25)
    masks = prune(cut, sensitivity, task=make_task()).program.masks
    name = "rnn.weight_ih_l0"
    assert torch.equal(
        masks.connections[name][:, 2:], lowest(scores[name][:, 2:], sparsity=0.25)[0]
    )
    assert bool(masks.connections[name][:, :2].all())  # gone already, so not counted


def test_frozen_parameters_have_gradients_too(model: Tagger) -> None:
    expected = slow_scores(model, mse, batches())["rnn.weight_hh_l0"]
    frozen = copy.deepcopy(model).requires_grad_(False)
    program = trace(frozen, torch.zeros(4, 2, 3))
    with torch.no_grad():
        outcome = prune(program, Sensitivity("gradient", sparsity=0.3), task=make_task())
    keep = outcome.program.masks.connections["rnn.weight_hh_l0"]
    assert torch.equal(keep, lowest(expected, sparsity=0.3)[0])


def test_everything_else_stays_as_it_was(model: Tagger, tagger: Program) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sequences = TensorDataset(torch.cat(batches(), dim=1).transpose(0, 1))
    loader = DataLoader(sequences, batch_size=2, shuffle=True)

    def loss(module: nn.Module, batch: list[Tensor]) -> Tensor:
        return mse(module, batch[0].transpose(0, 1) + torch.rand(()))

    task = make_task(loss, loader)
    sensitivity = Sensitivity("gradient", sparsity=0.5)
    first = prune(tagger, sensitivity, task=task).program
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = prune(tagger, sensitivity, task=task).program
    other = prune(tagger, sensitivity, task=replace(task, seed=1)).program
    assert second.masks.same_as(first.masks)
    assert not other.masks.same_as(first.masks)
    assert first.tensors is tagger.tensors
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


# Neurons ------------------------------------------------------------------------------------------


def slow_sums(program: Program, scores: dict[str, Tensor]) -> dict[int, float]:
    """Scores over every entry that begins or ends at a neuron, each once."""
    neurons = Facts(program)[NeuronAnalysis]
    sums = {}
    for neuron in neurons.free.nonzero().flatten().tolist():
        values = []
        for block in neurons.blocks:
            own = (block.sources == neuron) | (block.destinations == neuron)
            values += scores[block.weight][own.expand(block.shape)].double().tolist()
        sums[neuron] = math.fsum(values)
    return sums


@pytest.mark.parametrize("criterion", ["std", "gradient"])
def test_neurons_with_the_lowest_sums_go(model: Tagger, tagger: Program, criterion: Any) -> None:
    if criterion == "gradient":
        scores = slow_scores(model, mse, batches())
    else:
        weights = {n: tagger.tensors[n].detach().abs().double() for n in WEIGHTS}
        scores = {n: w / w.std(correction=0) for n, w in weights.items()}
    sums = slow_sums(tagger, scores)
    groups = [g for g in Facts(tagger)[NeuronAnalysis].groups if not g.frozen]
    expected = set[int]()
    for group in groups:
        order = sorted(group.neurons.tolist(), key=sums.__getitem__)
        expected |= set(order[: len(order) // 2])
    sensitivity = Sensitivity(criterion, sparsity=0.5, structure="neuron")
    masks = prune(tagger, sensitivity, task=make_task()).program.masks
    assert len(expected) == 5
    assert set(masks.neurons.tolist()) == expected
    assert not masks.connections


def test_model_without_free_neurons_is_refused_for_neurons_only() -> None:
    program = trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(PreconditionError, match="no neuron of this model may be removed"):
        prune(program, Sensitivity(structure="neuron"))
    assert prune(program, Sensitivity(threshold=3)).program is not program


# With the pipeline --------------------------------------------------------------------------------


def test_gradient_needs_a_task_and_says_so(tagger: Program) -> None:
    with pytest.raises(PreconditionError) as caught:
        prune(tagger, Sensitivity("gradient"))
    assert str(caught.value) == (
        "pass 'sensitivity': criterion 'gradient' needs a loss and batches, and there is no task. "
        "Give one: task=fxprune.Task(...), or on the command line a package.module:function that "
        "returns it; or choose criterion 'std', which looks at weights only."
    )


@pytest.mark.parametrize("criterion", ["std", "gradient"])
def test_compile_fine_tunes_after_it(model: Tagger, criterion: Any) -> None:
    sensitivity = Sensitivity(criterion)
    tuned, left = (
        fxprune.compile(
            model,
            str(sensitivity),
            example_inputs=torch.zeros(4, 2, 3),
            task=make_task(epochs=epochs),
            progress=False,
        )
        for epochs in (5, 0)
    )
    x = batches(1)[0]
    assert mse(tuned.module, x).item() < mse(left.module, x).item()
    assert tuned.report.sparsity == left.report.sparsity > 0


# What is refused ----------------------------------------------------------------------------------


def poisoned_root(model: nn.Module, batch: Tensor) -> Tensor:
    y: Tensor = model(batch)
    return mse(model, batch) + (y - y.detach()).abs().sqrt().sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: mse(m, b) * math.inf, "batch 1: Task.loss is inf"),
        (lambda m, b: m(b), "batch 1: Task.loss must return one real number"),
        (lambda m, b: 1.0, "batch 1: Task.loss must return one real number"),
        (lambda m, b: mse(m, b).detach(), "batch 1: Task.loss does not depend on the weights"),
        (lambda m, b: mse(m, b) * 0, "sums to 0.0 over 3 batches"),
        (poisoned_root, "batch 1: the gradient of 'stem.weight' is not finite"),
    ],
)
def test_useless_losses_are_refused(tagger: Program, loss: Any, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        prune(tagger, Sensitivity("gradient"), task=make_task(loss))


def test_data_without_batches_are_refused(tagger: Program) -> None:
    class Empty:
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(TrainingError, match=r"Task\.train gave no batches"):
        prune(tagger, Sensitivity("gradient"), task=make_task(train=Empty()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "snip"}, "'criterion' of pass 'sensitivity' must be one of"),
        ({"threshold": -1}, "'threshold' of pass 'sensitivity' must be a number at least 0"),
        ({"floor": 1}, r"'floor' of pass 'sensitivity' must be a number in \[0, 1\)"),
        ({"sparsity": 1}, "'sparsity' of pass 'sensitivity' must be a number"),
        ({"batches": 0}, "'batches' of pass 'sensitivity' must be an integer, at least 1"),
        ({"batches": 2.0}, "'batches' of pass 'sensitivity' must be an integer, at least 1"),
        ({"sparsity": 0.9}, "'sparsity' of pass 'sensitivity' has no effect with criterion=std"),
        ({"batches": 4}, "'batches' of pass 'sensitivity' has no effect"),
        ({"row_floor": 0}, "'row_floor' of pass 'sensitivity' must be one of True, False"),
        ({"row_floor": False}, "'row_floor' of pass 'sensitivity' has no effect"),
        ({"criterion": "gradient", "floor": 0.1}, "'floor' of pass 'sensitivity' has no effect"),
        (
            {"structure": "neuron", "threshold": 3},
            "'threshold' of pass 'sensitivity' has no effect",
        ),
        ({"structure": "neuron", "batches": 4}, "'batches' of pass 'sensitivity' has no effect"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sensitivity(**options)
