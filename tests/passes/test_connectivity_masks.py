"""The masks of sparse connectivity learning: one batch by hand, and how weights are divided up."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.contract import Facts, NeuronAnalysis
from fxprune.masking.gating import mask_module_name
from fxprune.masking.prunable import find_prunable
from fxprune.passes import SparseConnectivity
from fxprune.passes._connectivity_masks import ConnectionMask, Partition, partition
from fxprune.policy import protected
from fxprune.preparing import Prepared
from fxprune.program import Program
from fxprune.tracing.tracer import trace

# One batch, by hand -------------------------------------------------------------------------------

X = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
W = torch.tensor([[0.5, -1.0], [2.0, 0.25], [-1.5, 1.0]])
M = torch.tensor([[0.05, -0.02], [-0.01, -0.03], [0.04, 0.06]])  # the middle row is off
FILTERS = torch.tensor([0.05, -0.01, 0.04])
SLOPES: dict[str, Callable[[float], float]] = {
    "identity": lambda m: 1.0,
    "softplus": lambda m: 1 / (1 + math.exp(-m)),
    "leaky_relu": lambda m: 1.0 if m > 0 else 0.1,
}


class Both(nn.Module):
    """Two layers side by side."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts["used"](x), self.parts["idle"](x)


def mask_of(prepared: Prepared, weight: str) -> ConnectionMask:
    found = prepared.module.get_submodule(mask_module_name(weight))
    assert isinstance(found, ConnectionMask)
    return found


def one_layer(**options: Any) -> tuple[Prepared, ConnectionMask, nn.Parameter]:
    """A linear layer whose mask variables are those above; the learning rate is 0.01."""
    model = nn.Linear(2, 3, bias=False)
    given = {"penalty": 0.5, "rate": 1.0, "end": 1.0} | options
    prepared = fxprune.prepare(model, SparseConnectivity(**given), example_inputs=X, steps=100)
    mask, weight = mask_of(prepared, "weight"), prepared.module.get_parameter("weight")
    with torch.no_grad():
        weight.copy_(W)
        mask.values.copy_(M if mask.filters is None else FILTERS)
    return prepared, mask, weight


def by_hand(normalize: bool, estimator: str) -> Tensor:
    """The mask variables after a step on the loss sum(y^2) / 2, in plain numbers."""
    on = (M > 0).float()
    error = X @ (W * on).T  # dL/dy = y
    by_weight = error.T @ X
    slope = torch.tensor([[SLOPES[estimator](float(m)) for m in row] for row in M])
    gradient = by_weight * W * slope
    if normalize:
        norms = [math.sqrt(sum(float(g) ** 2 for g in row)) for row in gradient]
        norms[1] = 1.0  # off as a whole
        gradient = gradient / torch.tensor(norms)[:, None]
    return M - 0.01 * (gradient + 0.5 * slope)


@pytest.mark.parametrize("estimator", list(SLOPES))
@pytest.mark.parametrize("normalize", [True, False])
def test_one_step_of_the_mask_variables(normalize: bool, estimator: str) -> None:
    prepared, mask, weight = one_layer(normalize=normalize, estimator=estimator)
    (prepared.module(X).square().sum() / 2).backward()
    on = (M > 0).float()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, ((X @ (W * on).T).T @ X) * on)
    prepared.step()
    torch.testing.assert_close(mask.values.detach(), by_hand(normalize, estimator))
    assert mask.values.grad is None


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_features_that_are_off_move_by_a_norm_of_1_at_most(size: float) -> None:
    prepared, mask, _ = one_layer(penalty=0.0)
    (size * prepared.module(X)[:, 1]).sum().backward()
    gradient = size * X.sum(0) * W[1]
    prepared.step()
    expected = M[1] - 0.01 * gradient / max(1.0, float(gradient.norm()))
    torch.testing.assert_close(mask.values.detach()[1], expected)


def test_filters_share_the_norm_of_their_weight() -> None:
    """One variable per row; their gradients are the sums over the rows, in units of their norm."""
    prepared, mask, _ = one_layer(structure="filter")
    (prepared.module(X).square().sum() / 2).backward()
    on = (FILTERS > 0).float()[:, None]
    gradient = ((X @ (W * on).T).T @ X * W).sum(1)
    prepared.step()
    torch.testing.assert_close(
        mask.values.detach(), FILTERS - 0.01 * (gradient / gradient.norm() + 0.5)
    )


def test_variables_stay_within_the_bound_and_steps_within_the_initial_value() -> None:
    prepared, mask, _ = one_layer(rate=1e6, penalty=0.0, initial=0.1, bound=0.12)
    assert mask.variables.rate == 0.1
    for _ in range(4):
        (-prepared.module(X).square().sum()).backward()  # whatever is on should be
        prepared.step()
    values = mask.values.detach()
    assert float(values[M > 0].max()) == pytest.approx(0.12)
    assert float(values.abs().max()) <= 0.12 + 1e-7


def test_gradients_of_two_batches_add_up_before_they_are_normalized() -> None:
    prepared, mask, _ = one_layer()
    for part in X.split(1):
        (prepared.module(part).square().sum() / 2).backward()
    prepared.step()
    torch.testing.assert_close(mask.values.detach(), by_hand(True, "identity"))


def test_a_step_that_is_not_finite_is_left_out() -> None:
    prepared, mask, _ = one_layer()
    (prepared.module(X).sum() * math.inf).backward()
    prepared.step()
    assert torch.equal(mask.values, M)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_what_is_off_keeps_its_weight(decay: float) -> None:
    prepared, mask, weight = one_layer(penalty=0.0)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=decay)
    with torch.no_grad():
        mask.values.fill_(0.1)
    for m in (torch.full_like(M, 0.1), M):  # the first step leaves momentum behind
        with torch.no_grad():
            mask.values.copy_(m)
        before = weight.detach().clone()
        optimizer.zero_grad()
        prepared.module(X).square().sum().backward()
        optimizer.step()
        prepared.step()
    off = M <= 0
    assert torch.equal(weight[off], before[off])
    assert bool((weight[~off] != before[~off]).all())


def test_connections_that_the_loss_does_not_reach_cost_as_much() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 3), "idle": nn.Linear(2, 3)})
    chosen = SparseConnectivity(penalty=0.5, rate=1.0, end=1.0)
    prepared = fxprune.prepare(Both(model), chosen, example_inputs=X, steps=100)
    idle = mask_of(prepared, "parts.idle.weight")
    before = idle.values.detach().clone()
    prepared.module(X)[0].square().sum().backward()
    prepared.step()
    torch.testing.assert_close(idle.values.detach(), before - 0.01 * 0.5)


@pytest.mark.parametrize("looks", [0, 1])
def test_weights_of_the_first_run_in_a_step_are_held(looks: int) -> None:
    """Perturbed weights, or those after the optimizer's step, are not what it found."""
    prepared, _, weight = one_layer(penalty=0.0)
    before = weight.detach().clone()
    prepared.module(X).square().sum().backward()
    with torch.no_grad():
        weight.add_(1.0)
    for _ in range(looks):
        prepared.module(X)
    prepared.step()
    off = M <= 0
    assert torch.equal(weight[off], before[off])


def test_weights_that_are_loaded_are_not_undone() -> None:
    prepared, _, weight = one_layer(penalty=0.0)
    prepared.module(X)  # a look, and then the weights of another run
    other = {n: t + 1.0 if n == "weight" else t for n, t in prepared.module.state_dict().items()}
    prepared.module.load_state_dict(other)
    prepared.step()
    assert torch.equal(weight, W + 1.0)


def test_weights_are_held_only_while_masks_are_learned() -> None:
    prepared, mask, weight = one_layer(end=0.01)  # one step
    assert not any(p is mask.values for p in prepared.module.parameters())
    with torch.no_grad():
        prepared.module(X)
    assert not mask._held
    prepared.module(X).sum().backward()
    assert mask._held
    prepared.step()
    values = mask.values.clone()
    prepared.module(X).sum().backward()
    prepared.step()
    assert mask._before is None
    assert mask.values.grad is None
    assert torch.equal(mask.values, values)
    assert weight.grad is not None


# Rows, units, gates -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(nn.GRU(6, 5), torch.zeros(4, 2, 6))


def parts_of(program: Program, name: str, structure: str, feature: str) -> Partition:
    neurons = Facts(program)[NeuronAnalysis]
    found = find_prunable(program, neurons, protected(program, neurons, ()))
    weight = next(w for w in found.weights if w.name == name)
    return partition(weight, neurons, structure, feature)


def test_a_feature_is_a_row_of_one_gate_or_a_unit_over_all_gates(program: Program) -> None:
    rows = parts_of(program, "weight_hh_l0", "connection", "row")
    assert rows.rows == (15, 1)
    assert rows.features.tolist() == list(range(15))
    units = parts_of(program, "weight_hh_l0", "connection", "unit").features
    assert units.tolist() == units[:5].tolist() * 3
    assert len(units.unique()) == 5


def test_a_filter_is_a_row_or_a_unit_and_its_feature_a_gate_or_the_weight(program: Program) -> None:
    rows = parts_of(program, "weight_ih_l0", "filter", "row")
    assert rows.filters is not None
    assert rows.sizes is not None
    assert rows.filters.tolist() == list(range(15))
    assert rows.features.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert rows.sizes.tolist() == [6] * 15
    units = parts_of(program, "weight_ih_l0", "filter", "unit")
    assert units.filters is not None
    assert units.sizes is not None
    assert units.filters.tolist() == units.filters[:5].tolist() * 3
    assert units.features.tolist() == [0] * 5
    assert units.sizes.tolist() == [18] * 5


def test_rows_of_other_layers() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 5), nn.ConvTranspose1d(4, 6, 2))
    program = trace(net, torch.zeros(2, 3, 9))
    assert parts_of(program, "0.weight", "connection", "row").rows == (4, 1, 1)
    assert parts_of(program, "1.weight", "connection", "row").rows == (1, 6, 1)


def test_filters_cost_what_they_hold(program: Program) -> None:
    """The average filter has the price, the others in proportion to their connections."""
    given = SparseConnectivity(penalty=0.1, structure="filter", rate=0.08, end=1.0)
    prepared = fxprune.prepare(program, given, steps=8)
    (prepared.module(torch.ones(4, 2, 6))[0].sum() * 0.0).backward()
    prepared.step()
    average = (15 * 6 + 15 * 5) / 30
    for name, size in {"weight_ih_l0": 6, "weight_hh_l0": 5}.items():
        moved = 0.1 - mask_of(prepared, name).values.detach()
        torch.testing.assert_close(moved, torch.full((15,), 0.01 * 0.1 * size / average))
