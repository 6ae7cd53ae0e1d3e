"""Costs agree with what masks leave and with the compact program, and their gradients with sums."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fxprune.analysis import Neurons, analyze
from fxprune.learning.cost import COSTS, Cost
from fxprune.masking.counting import count
from fxprune.masking.macs import macs
from fxprune.masking.masks import Masks
from fxprune.program import Program
from fxprune.shrinking.compact import compact_program
from fxprune.shrinking.liveness import alive_neurons
from fxprune.tracing.tracer import trace
from tests.zoo import by_name
from tests.zoo_model import ZooModel

NAMES = (
    "packed-bilstm-two-layer",
    "gru-cell-loop",
    "conv-lstm",
    "tied-projected-lm",
    "tied-character-model",
)
MODELS = [pytest.param(by_name(n), id=n) for n in NAMES]


def analysed(model: ZooModel) -> tuple[Program, Neurons]:
    torch.manual_seed(0)
    program = trace(model.build(), model.inputs(model.batch, model.time))
    return program, analyze(program)


def cut_some(program: Program, neurons: Neurons) -> tuple[Program, Tensor]:
    """The program with every third free neuron cut, not all of a group; and which are left."""
    cut = torch.cat([g.neurons[g.free][1::3] for g in neurons.groups])
    masks = Masks(neurons=cut.sort().values)
    alive = alive_neurons(neurons, masks)
    alive[cut] = False
    return replace(program, masks=masks), alive.double()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("model", MODELS)
def test_whole_neurons_cost_what_is_counted(model: ZooModel) -> None:
    program, neurons = analysed(model)
    masked, alive = cut_some(program, neurons)
    small = compact_program(masked, neurons).program
    shapes = {n: tuple(small.tensors[n].shape) for n in small.tensors}
    counts = count(masked, neurons, masked.masks, alive.bool(), shapes)

    parameters = Cost(program, neurons, "parameters")
    for name, entries in zip(parameters.names, parameters.entries(alive).tolist(), strict=True):
        assert entries == small.tensors[name].numel(), name
    assert parameters.dense == counts.parameters.before
    blocks = Cost(program, neurons, "macs")
    found = dict(zip(blocks.names, blocks.entries(alive).tolist(), strict=True))
    counted = {b.name: b.connections.after for b in counts.blocks}
    assert {name: found[name] for name in counted} == counted
    by_weight = {name.partition("#")[0]: n for name, n in counted.items()}
    assert all(n == by_weight[name.partition("#")[0]] for name, n in found.items())  # every use
    if macs(program) == pytest.approx(blocks.dense):
        assert float(blocks.expected(alive)) == pytest.approx(macs(small), rel=1e-12)


class Pair(nn.Module):
    """Two RNN layers of 4 units over 3 features, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, num_layers=2)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def pair() -> tuple[Program, Neurons]:
    program = trace(Pair(), torch.zeros(5, 2, 3))
    return program, analyze(program)


def some_present(neurons: Neurons) -> tuple[Tensor, Tensor, Tensor]:
    """Random probabilities, over all and those of the units of either layer."""
    torch.manual_seed(0)
    p = torch.ones(neurons.count)
    layers = [g.neurons for g in neurons.groups if g.recurrent]
    for units in layers:
        p[units] = torch.rand(4)
    p.requires_grad_()
    return p, p[layers[0]], p[layers[1]]


def test_recurrent_blocks_count_self_loops_once(pair: tuple[Program, Neurons]) -> None:
    """The expected number of connections by the paper: sum_{i != j} p_i p_j + sum_i p_i."""
    program, neurons = pair
    p, a, b = some_present(neurons)

    def square(q: Tensor) -> Tensor:
        return q.outer(q).sum() - q.square().sum() + q.sum()

    connections = 3 * a.sum() + square(a) + a.sum() * b.sum() + square(b) + 2 * b.sum()
    by_hand = 5 * 2 * connections  # time and batch of the example
    found = Cost(program, neurons, "macs").expected(p)
    torch.testing.assert_close(found.float(), by_hand, rtol=1e-6, atol=0)
    (expected,) = torch.autograd.grad(by_hand, p, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found, p)[0], expected, rtol=1e-6, atol=0)

    biases = 2 * a.sum() + 2 * b.sum() + 2
    parameters = Cost(program, neurons, "parameters").expected(p)
    torch.testing.assert_close(parameters.float(), connections + biases, rtol=1e-6, atol=0)


def test_measured_prices_spread_over_an_operation_and_are_saved(
    pair: tuple[Program, Neurons],
) -> None:
    program, neurons = pair
    first, second = (Cost(program, neurons, "milliseconds") for _ in range(2))
    prices = dict(zip(first.names, first.prices.tolist(), strict=True))
    assert prices["rnn.weight_ih_l0"] == prices["rnn.weight_hh_l0"] > 0
    assert prices["out.weight"] > 0
    for name, buffer in first.named_buffers():  # what a checkpoint is known by
        assert torch.equal(buffer.nan_to_num(), second.get_buffer(name).nan_to_num())
    measured = first.prices.clone()
    first.keep_prices()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.prices, measured)
    assert torch.equal(second.prices, measured)
    assert not Cost(program, neurons, "macs").state_dict()
    assert set(COSTS) == {"parameters", "macs", "milliseconds"}


def test_precision_stays_and_copies_agree(pair: tuple[Program, Neurons]) -> None:
    program, neurons = pair
    cost = Cost(program, neurons)
    dense = cost.dense
    assert copy.deepcopy(cost).bfloat16().dense == dense == macs(program)
