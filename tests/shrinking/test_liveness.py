"""A neuron lives if something reads it, through whatever masks leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.analysis import Neurons, analyze
from fxprune.masking.masks import Masks
from fxprune.masking.operands import operand_mask
from fxprune.shrinking.liveness import alive_neurons, kept_neurons
from tests.small import Tagger, frames


class Net(nn.Module):
    """Two hidden layers, 4 and 3 wide; the head is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 4), nn.Linear(4, 3)
        self.head = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps 2 to 2."""
        y: Tensor = self.two(self.one(x).relu()).relu() @ self.head
        return y


@pytest.fixture(scope="module")
def net() -> Neurons:
    return analyze(fxprune.trace(Net(), torch.randn(3, 2)))


def left(neurons: Neurons, masks: Masks) -> list[int]:
    """How many neurons of each group live."""
    alive = alive_neurons(neurons, masks)
    return [int(alive[g.neurons].sum()) for g in neurons.groups]


def without(name: str, shape: tuple[int, int], index: tuple[slice | int, slice | int]) -> Masks:
    keep = torch.ones(shape, dtype=torch.bool)
    keep[index] = False
    return Masks(connections={name: keep})


def test_nothing_masked_nothing_dead(net: Neurons) -> None:
    assert left(net, Masks()) == [2, 4, 3, 2]


def test_what_only_dead_neurons_read_is_dead(net: Neurons) -> None:
    everything = slice(None)
    masks = without("head", (3, 2), (0, everything))
    assert left(net, masks) == [2, 4, 2, 2]
    both = masks.cut_connections(without("two.weight", (3, 4), (slice(1, 3), 1)).connections)
    assert left(net, both) == [2, 3, 2, 2]
    none = without("head", (3, 2), (everything, everything))
    assert left(net, none) == [2, 0, 0, 2]


def test_a_cut_neuron_is_read_by_nothing(net: Neurons) -> None:
    middle = net.groups[2].neurons
    assert left(net, Masks().cut_neurons(middle[:1])) == [2, 4, 2, 2]
    assert left(net, Masks().cut_neurons(middle)) == [2, 0, 0, 2]


def test_outputs_and_inputs_stay(net: Neurons) -> None:
    alive = alive_neurons(net, Masks().cut_neurons(torch.arange(net.count)))
    assert alive[net.groups[0].neurons].all()
    assert alive[net.groups[-1].neurons].all()


def test_dead_neurons_that_read_each_other_are_dead() -> None:
    """However densely: a recurrent layer whose outputs nothing reads."""
    neurons = analyze(fxprune.trace(Tagger(), frames()))
    masks = without("head.weight", (2, 6), (slice(None), slice(None)))
    assert left(neurons, masks) == [3, 0, 0, 2]
    one = without("head.weight", (2, 6), (slice(None), slice(1, 6)))
    assert left(neurons, one) == [3, 5, 6, 2]  # unit 0 reads all others


def test_masks_follow_a_rearranged_weight(net: Neurons) -> None:
    block = next(b for b in net.blocks if b.weight == "head")
    keep = torch.rand(3, 2) > 0.5
    found = operand_mask(block, {"head": keep})
    assert found is not None
    assert torch.equal(found, keep if found.shape == keep.shape else keep.t())
    assert operand_mask(block, {"other": keep}) is None


def test_a_dimension_keeps_one_neuron(net: Neurons) -> None:
    masks = Masks().cut_neurons(torch.cat([net.groups[1].neurons, net.groups[2].neurons]))
    kept = kept_neurons(net, alive_neurons(net, masks), masks)
    assert [int(kept[g.neurons].sum()) for g in net.groups] == [2, 1, 1, 2]


def test_the_one_kept_is_not_cut_if_another_is_there(net: Neurons) -> None:
    middle = net.groups[1].neurons
    masks = without("two.weight", (3, 4), (slice(None), slice(None))).cut_neurons(middle[[0, 2]])
    kept = kept_neurons(net, alive_neurons(net, masks), masks)
    assert kept[middle].tolist() == [False, True, False, False]
