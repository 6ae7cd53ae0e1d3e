"""Counting what masks leave: neurons, connections and parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.analysis.neurons import ConnectionClass
from fxprune.errors import DependencyError
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
        blocks: one entry per block, in execution order; a tied weight has one for each use.
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
        for b in neurons.blocks
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
    mask = masks.connections.get(block.weight)
    if mask is not None:
        left = left & (mask if block.direct else _mask_of_operand(block, mask)).to(left.device)
    # Arrays may be 1 along a dimension that carries no neurons: each entry stands for several.
    repeats = math.prod(block.shape) // max(1, left.numel())
    return Count(math.prod(block.shape), int(left.count_nonzero()) * repeats)


def _look_up(flags: Tensor, numbers: Tensor) -> Tensor:
    """Flags of neurons; True where there is none."""
    none = numbers < 0
    return flags[numbers.clamp(min=0)] | none if len(flags) else none


def _mask_of_operand(block: Block, mask: Tensor) -> Tensor:
    """Follows a mask from its weight through the rearrangement that the operation reads."""
    values: dict[fx.Node, Any] = {}
    for node in _ancestry(block.operand):
        values[node] = _follow(node, values, block.weight, mask)
    followed = values[block.operand]
    if tuple(followed.shape) != block.shape:
        raise DependencyError(
            f"the mask of {block.weight!r} has shape {list(followed.shape)} where "
            f"{block.consumer.name!r} reads the weight as {list(block.shape)}. Please report the "
            "model.",
            nodes=(block.operand.name, block.consumer.name),
        )
    return followed != 0  # type: ignore[no-any-return]


def _follow(node: fx.Node, values: Mapping[fx.Node, Any], weight: str, mask: Tensor) -> Any:
    if node.op == "get_attr":
        if node.target == weight:
            return mask.float()
        return torch.ones(tuple(int(n) for n in node.meta["val"].shape))
    if node.op == "placeholder" or not isinstance(node.meta.get("val"), Tensor):
        return _hint(node)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _ancestry(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, in execution order."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found[current] = None
            waiting.extend(current.all_input_nodes)
    return sorted(found)


def _hint(node: fx.Node) -> Any:
    """The value of a size at the example; a tensor of ones for an input."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return torch.ones(tuple(int(n) for n in value.shape))
    return pytree.tree_map_only(torch.SymInt, int, value)
