"""Counts equal those made by hand on a GRU with a linear layer behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxprune.analysis.neurons import Block, ConnectionClass, Group, Neurons
from fxprune.masking.counting import BlockCount, Count, count
from fxprune.masking.masks import Masks
from fxprune.program import Program
from fxprune.tracing.tracer import trace

INPUTS, UNITS, OUTPUTS = 3, 4, 2
WEIGHTS = {
    "rnn.weight_ih_l0": "input",
    "rnn.weight_hh_l0": "recurrent",
    "out.weight": "feedforward",
}


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
    """Inputs are neurons 0-2, units 3-6, outputs 7-8."""
    x, units, y = torch.arange(3), torch.arange(3, 7), torch.arange(7, 9)
    gates = units.repeat(3).unsqueeze(1)  # [12, 1]
    ends = {
        "rnn.weight_ih_l0": (x.unsqueeze(0), gates, (12, 3), "x", "rnn"),
        "rnn.weight_hh_l0": (units.unsqueeze(0), gates, (12, 4), "rnn", "rnn"),
        "out.weight": (units.unsqueeze(0), y.unsqueeze(1), (2, 4), "rnn", "out"),
    }
    reads = {n.target: n for n in program.graph.nodes if n.op == "get_attr"}
    blocks = []
    for name, (sources, destinations, shape, source, destination) in ends.items():
        (user,) = reads[name].users
        operand, consumer = reads[name], user
        if name == "out.weight":
            operand, (consumer,) = user, user.users
        kind = ConnectionClass(WEIGHTS[name])
        blocks.append(
            Block(
                name,
                name,
                operand,
                consumer,
                sources,
                destinations,
                shape,
                kind,
                source,
                destination,
            )
        )
    free = torch.tensor([False] * 3 + [True] * 4 + [False] * 2)
    groups = (
        Group("x", x, free[x], False, "the model's input"),
        Group("rnn", units, free[units], True, ""),
        Group("out", y, free[y], False, "the model's output"),
    )
    return Neurons(9, groups, tuple(blocks), (), {}, {}, free, ())


def connections(blocks: tuple[BlockCount, ...]) -> dict[str, tuple[int, int]]:
    return {b.name: (b.connections.before, b.connections.after) for b in blocks}


def shapes(program: Program, units: int) -> dict[str, tuple[int, ...]]:
    model = nn.GRU(INPUTS, units)
    gru = {f"rnn.{n}": tuple(p.shape) for n, p in model.named_parameters()}
    return {**gru, "out.weight": (units, OUTPUTS)}


def test_nothing_pruned(program: Program, neurons: Neurons) -> None:
    counts = count(program, neurons, Masks(), torch.ones(9, dtype=torch.bool), shapes(program, 4))
    assert [(g.name, g.neurons) for g in counts.groups] == [
        ("x", Count(3, 3)),
        ("rnn", Count(4, 4)),
        ("out", Count(2, 2)),
    ]
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
    alive = torch.ones(9, dtype=torch.bool)
    alive[4] = False
    masks = Masks().cut_neurons(torch.tensor([4]))
    counts = count(program, neurons, masks, alive, shapes(program, 3))
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
    masks = Masks().cut_neurons(torch.tensor([4]))
    counts = count(program, neurons, masks, torch.ones(9, dtype=torch.bool), shapes(program, 4))
    assert connections(counts.blocks) == {
        "rnn.weight_ih_l0": (36, 36),
        "rnn.weight_hh_l0": (48, 36),
        "out.weight": (8, 6),
    }


def test_masks_of_rearranged_weights_are_followed(program: Program, neurons: Neurons) -> None:
    keep = torch.ones(UNITS, OUTPUTS, dtype=torch.bool)
    keep[0, 1] = keep[2, 0] = False  # connections of units 3 and 5
    alive = torch.ones(9, dtype=torch.bool)
    alive[5] = False  # unit 5 goes as a whole: 2 connections, one of them masked anyway
    masks = Masks(connections={"out.weight": keep})
    counts = count(program, neurons, masks, alive, shapes(program, 3))
    assert connections(counts.blocks)["out.weight"] == (8, 5)


def test_masks_of_direct_weights(program: Program, neurons: Neurons) -> None:
    keep = torch.rand(12, 3) > 0.5
    masks = Masks(connections={"rnn.weight_ih_l0": keep})
    counts = count(program, neurons, masks, torch.ones(9, dtype=torch.bool), shapes(program, 4))
    assert connections(counts.blocks)["rnn.weight_ih_l0"] == (36, int(keep.sum()))
    assert counts.by_class[ConnectionClass.INPUT].removed == pytest.approx(
        1 - float(keep.float().mean()), abs=1e-7
    )


def test_rows_of_an_embedding_come_from_no_neuron(program: Program, neurons: Neurons) -> None:
    (block, *_) = neurons.blocks
    rowless = Block(
        "table", "rnn.weight_ih_l0", block.operand, block.consumer,
        torch.tensor([[-1]]), torch.arange(3).unsqueeze(0), (12, 3),
    )  # fmt: skip
    alive = torch.tensor([True, False, True] + [True] * 6)
    only = Neurons(9, neurons.groups, (rowless,), (), {}, {}, neurons.free, ())
    counts = count(program, only, Masks(), alive, {})
    assert connections(counts.blocks) == {"table": (36, 24)}
    assert counts.parameters.after == 0
