"""Counts equal those made by hand on a GRU with a linear layer behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.analysis import ConnectionClass, Neurons, analyze
from fxprune.masking.counting import BlockCount, Count, count
from fxprune.masking.masks import Masks
from fxprune.program import Program
from fxprune.tracing.tracer import trace

INPUTS, UNITS, OUTPUTS = 3, 4, 2


class Tagger(nn.Module):
    """A GRU and a linear layer that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(INPUTS, UNITS)
        self.out = nn.Module()
        self.out.weight = nn.Parameter(torch.randn(UNITS, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [time, batch, 3] to [time, batch, 2]."""
        weight: Tensor = self.out.get_parameter("weight")
        return nn.functional.linear(self.rnn(x)[0], weight.transpose(0, 1))


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(Tagger(), torch.randn(5, 1, INPUTS))


@pytest.fixture(scope="module")
def neurons(program: Program) -> Neurons:
    return analyze(program)


def units(neurons: Neurons) -> Tensor:
    """The numbers of the units of the GRU."""
    (group,) = (g for g in neurons.groups if g.recurrent)
    return group.neurons


def all_but(neurons: Neurons, *dead: int) -> Tensor:
    """Which neurons are alive if these units of the GRU are not."""
    alive = torch.ones(neurons.count, dtype=torch.bool)
    alive[units(neurons)[list(dead)]] = False
    return alive


def connections(blocks: tuple[BlockCount, ...]) -> dict[str, tuple[int, int]]:
    return {b.name: (b.connections.before, b.connections.after) for b in blocks}


def shapes(program: Program, units: int) -> dict[str, tuple[int, ...]]:
    model = nn.GRU(INPUTS, units)
    gru = {f"rnn.{n}": tuple(p.shape) for n, p in model.named_parameters()}
    return {**gru, "out.weight": (units, OUTPUTS)}


def test_nothing_pruned(program: Program, neurons: Neurons) -> None:
    counts = count(program, neurons, Masks(), all_but(neurons), shapes(program, 4))
    assert [g.neurons for g in counts.groups] == [Count(3, 3), Count(4, 4), Count(2, 2)]
    assert [g.recurrent for g in counts.groups] == [False, True, False]
    assert [g.frozen for g in counts.groups] == [True, False, True]
    assert connections(counts.blocks) == {
        "rnn.weight_ih_l0": (36, 36),
        "rnn.weight_hh_l0": (48, 48),
        "out.weight": (8, 8),
    }
    parameters = 36 + 48 + 24 + 8
    assert counts.parameters == Count(parameters, parameters)
    assert counts.connections == Count(92, 92)
    assert counts.connections.removed == 0.0


def test_dead_neurons_take_their_connections_along(program: Program, neurons: Neurons) -> None:
    masks = Masks().cut_neurons(units(neurons)[1:2])
    counts = count(program, neurons, masks, all_but(neurons, 1), shapes(program, 3))
    assert counts.groups[1].neurons == Count(4, 3)
    assert connections(counts.blocks) == {
        "rnn.weight_ih_l0": (36, 27),
        "rnn.weight_hh_l0": (48, 27),
        "out.weight": (8, 6),
    }
    assert counts.by_class == {
        ConnectionClass.RECURRENT: Count(48, 27),
        ConnectionClass.INPUT: Count(36, 27),
        ConnectionClass.FEEDFORWARD: Count(8, 6),
    }
    assert counts.parameters == Count(116, 27 + 27 + 18 + 6)


def test_a_cut_neuron_that_lives_loses_only_what_leaves_it(
    program: Program, neurons: Neurons
) -> None:
    masks = Masks().cut_neurons(units(neurons)[1:2])
    counts = count(program, neurons, masks, all_but(neurons), shapes(program, 4))
    assert connections(counts.blocks) == {
        "rnn.weight_ih_l0": (36, 36),
        "rnn.weight_hh_l0": (48, 36),
        "out.weight": (8, 6),
    }


def test_masks_of_rearranged_weights_are_followed(program: Program, neurons: Neurons) -> None:
    keep = torch.ones(UNITS, OUTPUTS, dtype=torch.bool)
    keep[0, 1] = keep[2, 0] = False  # connections of units 0 and 2
    masks = Masks(connections={"out.weight": keep})
    # Unit 2 goes as a whole: two connections, one of them masked anyway.
    counts = count(program, neurons, masks, all_but(neurons, 2), shapes(program, 3))
    assert connections(counts.blocks)["out.weight"] == (8, 5)


def test_masks_of_direct_weights(program: Program, neurons: Neurons) -> None:
    keep = torch.rand(12, 3) > 0.5
    masks = Masks(connections={"rnn.weight_ih_l0": keep})
    counts = count(program, neurons, masks, all_but(neurons), shapes(program, 4))
    assert connections(counts.blocks)["rnn.weight_ih_l0"] == (36, int(keep.sum()))
    assert counts.by_class[ConnectionClass.INPUT].removed == pytest.approx(
        1 - float(keep.float().mean()), abs=1e-7
    )


def test_rows_of_an_embedding_come_from_no_neuron() -> None:
    program = trace(nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 2)), torch.tensor([[3, 4]]))
    neurons = analyze(program)
    table, linear = neurons.blocks
    alive = torch.ones(neurons.count, dtype=torch.bool)
    alive[table.destinations.flatten()[:2]] = False
    counts = count(program, neurons, Masks(), alive, {})
    assert connections(counts.blocks) == {table.name: (45, 27), linear.name: (10, 6)}
    assert counts.parameters == Count(45 + 10 + 2, 0)
