"""What the analysis finds: neurons, their groups, and the connections between them.

A neuron is a number. Every position along a dimension of a tensor that can be removed belongs to
one neuron; positions that must stay or go together share it. Arrays of neurons are int64 tensors
that broadcast against the value they describe; ``-1`` marks a position without a neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.analysis.places import Place
    from fxprune.program import Refusal

__all__ = ["INPUT", "OUTPUT", "Block", "ConnectionClass", "Entry", "Group", "Neurons", "Reader"]

INPUT = "input of the model"
"""Why the neurons of a model's inputs must stay."""

OUTPUT = "output of the model"
"""Why the neurons of a model's outputs must stay."""


class ConnectionClass(StrEnum):
    """How a block of connections meets recurrent neurons.

    Source: Li et al., "Evolutionary stage-wise pruning", TNNLS 2022, section on connection types.
    """

    RECURRENT = "recurrent"
    INPUT = "input"
    FEEDFORWARD = "feedforward"


@dataclass(frozen=True)
class Group:
    """The neurons that one dimension of one operation produces (or several, tied by sums).

    Attributes:
        name: taken from the first tensor that produces them, such as ``encoder.l0``.
        neurons: their numbers, ascending, int64 [size].
        free: which of them may be removed, bool [size].
        recurrent: whether they are units of a recurrent layer or cell, or what a loop written by
            hand carries from step to step.
        reason: why those that are not free must stay; empty if all are free.
    """

    name: str
    neurons: Tensor
    free: Tensor
    recurrent: bool
    reason: str

    @property
    def size(self) -> int:
        """Number of neurons."""
        return len(self.neurons)

    @property
    def frozen(self) -> bool:
        """Whether none of them may be removed."""
        return not bool(self.free.any())


@dataclass(frozen=True)
class Block:
    """One use of one weight tensor: all connections from its source to its destination neurons.

    Attributes:
        name: the weight's name, ``a.weight+b.weight`` if it is put together from several; further
            uses of a tied weight end in ``#2``, ``#3``, ...
        weights: names of the tensors that the weight is: one, or several put together.
        operand: the node that the operation reads, the weight itself or a rearrangement of it.
        consumer: the operation.
        place: where the operand stands among the operation's arguments.
        sources: neuron at the far end of each connection, broadcastable to the operand; all
            ``-1`` where connections come from no neuron (an embedding's rows).
        destinations: neuron at the near end, broadcastable to the operand.
        shape: shape of the operand.
        connection_class: see :class:`ConnectionClass`.
        source: name of the group most sources belong to; None if from no neuron.
        destination: name of the group of the destinations.
    """

    name: str
    weights: tuple[str, ...]
    operand: fx.Node
    consumer: fx.Node
    place: Place
    sources: Tensor
    destinations: Tensor
    shape: tuple[int, ...]
    connection_class: ConnectionClass = ConnectionClass.FEEDFORWARD
    source: str | None = None
    destination: str = ""

    @property
    def weight(self) -> str:
        """Name of the weight, of the first if it is put together of several."""
        return self.weights[0]

    @property
    def direct(self) -> bool:
        """Whether the operation reads the weight itself."""
        return self.operand.op == "get_attr"


@dataclass(frozen=True)
class Reader:
    """An operation that reads neurons other than through weights.

    Attributes:
        node: the operation.
        operand: the value it reads.
        neurons: the neurons read, broadcastable to the operand.
        kind: ``"reduction"`` (sum, mean, product of two values: a cut neuron adds nothing),
            ``"normalization"`` (a cut neuron is left out of the statistics), ``"state"`` (a
            recurrent state at the model's boundary), or ``"other"`` (it must stay).
    """

    node: fx.Node
    operand: fx.Node
    neurons: Tensor
    kind: str


@dataclass(frozen=True)
class Entry:
    """A recurrent state that comes in at its external size.

    Attributes:
        consumer: the layer or cell.
        state: the argument, whose last dimension is external.
        neurons: what the layer keeps of it, int64 [external size].
    """

    consumer: fx.Node
    state: fx.Node
    neurons: Tensor


@dataclass(frozen=True)
class Neurons:
    """The result of the analysis of one program.

    Attributes:
        count: number of neurons; they are numbered from 0.
        groups: disjoint, in execution order.
        blocks: every use of every weight, in execution order.
        readers: other reads of neurons.
        labels: for every node and tensor value, the neuron arrays ("axes") over its dimensions.
        owned: for every tensor name, the neuron arrays over its dimensions.
        entries: states at the boundary that keep their size on the way in.
        free: whether each neuron may be removed, bool [count].
        refusals: what could not be analysed and froze its neurons.
    """

    count: int
    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    readers: tuple[Reader, ...]
    labels: Mapping[fx.Node, tuple[Tensor, ...]]
    owned: Mapping[str, tuple[Tensor, ...]]
    entries: tuple[Entry, ...]
    free: Tensor
    refusals: tuple[Refusal, ...]

    def group(self, name: str) -> Group:
        """The group of that name."""
        return next(g for g in self.groups if g.name == name)

    def group_of(self) -> Tensor:
        """For every neuron the index of its group in ``groups``, int64 [count]; -1 for none."""
        index = torch.full((self.count,), -1, dtype=torch.int64)
        for i, group in enumerate(self.groups):
            index[group.neurons] = i
        return index
