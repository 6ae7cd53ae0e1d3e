"""Counting what masks leave: neurons, connections and parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fxprune.analysis.classes import distinct
from fxprune.analysis.neurons import ConnectionClass
from fxprune.masking.operands import operand_mask
from fxprune.program import Kind

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Block, Neurons
    from fxprune.masking.masks import Masks
    from fxprune.program import Program

__all__ = ["BlockCount", "Count", "Counts", "GroupCount", "count"]


@dataclass(frozen=True)
class Count:
    """A number before and after pruning."""

    before: int
    after: int

    def __add__(self, other: Count) -> Count:
        return Count(self.before + other.before, self.after + other.after)

    @property
    def removed(self) -> float:
        """The fraction that is gone; 0 where there was nothing."""
        return 1.0 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class GroupCount:
    """What is left of a neuron group.

    Attributes:
        name: the group.
        neurons: its neurons; after: those alive.
        recurrent: whether they are units of a recurrent layer or cell.
        frozen: whether none could be removed.
        reason: why those that are not free had to stay; empty if all were free.
    """

    name: str
    neurons: Count
    recurrent: bool
    frozen: bool
    reason: str


@dataclass(frozen=True)
class BlockCount:
    """What is left of a block of connections.

    Attributes:
        name: the block.
        connection_class: its class.
        connections: its connections. One is left if its mask keeps it, both its ends are alive,
            and its source is not cut.
    """

    name: str
    connection_class: ConnectionClass
    connections: Count


@dataclass(frozen=True)
class Counts:
    """What masks leave of a program.

    Attributes:
        groups: one entry per neuron group, in execution order.
        blocks: one entry per block, in execution order; a tied weight has one for each kind of
            use, and one that a loop uses at each step has one.
        by_class: connections of the classes that the program has.
        parameters: entries of all parameters; after: of those that the compact program holds.
    """

    groups: tuple[GroupCount, ...]
    blocks: tuple[BlockCount, ...]
    by_class: Mapping[ConnectionClass, Count]
    parameters: Count

    @property
    def connections(self) -> Count:
        """All connections."""
        return sum(self.by_class.values(), Count(0, 0))


def count(
    program: Program,
    neurons: Neurons,
    masks: Masks,
    alive: Tensor,
    sizes: Mapping[str, tuple[int, ...]],
) -> Counts:
    """Counts what masks leave of a program.

    Args:
        program: the program before shrinking.
        neurons: its analysis.
        masks: what is pruned of it.
        alive: which neurons something still reads, bool [count].
        sizes: shapes of the parameters of the compact program; tied ones once.

    Raises:
        DependencyError: a mask cannot be followed to where its weight is used.
    """
    source_counts = alive.clone()
    source_counts[masks.neurons] = False
    groups = tuple(
        GroupCount(
            g.name, Count(g.size, int(alive[g.neurons].sum())), g.recurrent, g.frozen, g.reason
        )
        for g in neurons.groups
    )
    blocks = tuple(
        BlockCount(b.name, b.connection_class, _connections(b, masks, source_counts, alive))
        for b in distinct(neurons.blocks)
    )
    by_class = {
        kind: sum((b.connections for b in blocks if b.connection_class is kind), Count(0, 0))
        for kind in ConnectionClass
        if any(b.connection_class is kind for b in blocks)
    }
    before = sum(
        t.numel() for n, t in program.tensors.items() if program.kinds[n] is Kind.PARAMETER
    )
    after = sum(math.prod(shape) for shape in sizes.values())
    return Counts(groups, blocks, by_class, Count(before, after))


def _connections(block: Block, masks: Masks, sources: Tensor, alive: Tensor) -> Count:
    left = _look_up(sources, block.sources) & _look_up(alive, block.destinations)
    mask = operand_mask(block, masks.connections)
    if mask is not None:
        left = left & mask.to(left.device)
    # Arrays may be 1 along a dimension that carries no neurons: each entry stands for several.
    repeats = math.prod(block.shape) // max(1, left.numel())
    return Count(math.prod(block.shape), int(left.count_nonzero()) * repeats)


def _look_up(flags: Tensor, numbers: Tensor) -> Tensor:
    """Flags of neurons; True where there is none."""
    none = numbers < 0
    return flags[numbers.clamp(min=0)] | none if len(flags) else none
