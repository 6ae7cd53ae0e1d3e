"""The three connection classes, by how a block's output meets recurrent neurons.

A recurrent neuron is a unit of a recurrent layer or cell, or a value on a path between two uses
of one weight (a loop written by hand). Values that only rearrange others do not count as neurons
of their own: a concatenation carries its parts.

Source: Li et al., TNNLS 2022, as read in the project's design: recurrent weights cross the time
step, input blocks feed recurrent neurons within one, the rest is feed-forward.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxprune.analysis.neurons import Block, ConnectionClass, Group, Neurons
from fxprune.analysis.places import Place
from fxprune.analysis.rules_moving import RULES as MOVING
from fxprune.analysis.rules_recurrent import INPUT_WEIGHT
from fxprune.operations import operation_name

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["LAYERS", "classify", "distinct"]

_Role = tuple[tuple[str, ...], str, Place]

_ORDER = [ConnectionClass.FEEDFORWARD, ConnectionClass.INPUT, ConnectionClass.RECURRENT]
LAYERS = tuple(INPUT_WEIGHT)
"""Operations with fixed roles for their weights."""


def classify(neurons: Neurons, program: Program) -> Neurons:
    """Fills in the class, source and destination of every block, and which groups are recurrent."""
    roles = _uses_by_role(neurons.blocks)
    loops = {role: _between(uses) for role, uses in roles.items() if len(uses) > 1}
    recurrent_values = {n for nodes in loops.values() for n in nodes}
    leading = _leading_to_recurrent(program.graph, recurrent_values)
    classes: dict[_Role, ConnectionClass] = {}
    for role, uses in roles.items():
        found = [_class_of(block, loops.get(role, set()), leading) for block in uses]
        classes[role] = max(found, key=_ORDER.index)
    group_of = np.append(neurons.group_of().numpy(), -1)  # so that no neuron is in no group

    def name(ids: torch.Tensor) -> str | None:
        groups = group_of[ids.numpy()].ravel()
        if groups.size and groups.min() != groups.max():
            groups = group_of[np.unique(ids.numpy())]
        groups = groups[groups >= 0]
        return neurons.groups[int(np.bincount(groups).argmax())].name if groups.size else None

    blocks = tuple(
        replace(
            block,
            connection_class=classes[_role(block)],
            source=name(block.sources),
            destination=name(block.destinations) or "",
        )
        for block in neurons.blocks
    )
    carried = [
        b.sources.reshape(-1)
        for b in blocks
        if b.connection_class is ConnectionClass.RECURRENT
        and operation_name(b.consumer) not in LAYERS
    ]
    return replace(neurons, blocks=blocks, groups=_marked(neurons.groups, carried))


def _marked(groups: tuple[Group, ...], carried: list[torch.Tensor]) -> tuple[Group, ...]:
    """Groups whose neurons a loop written by hand carries from step to step are recurrent."""
    if not carried:
        return groups
    state = torch.cat(carried)
    return tuple(
        replace(g, recurrent=g.recurrent or bool(torch.isin(g.neurons, state).any()))
        for g in groups
    )


def distinct(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Each weight once for each kind of use: loops use the same connections again and again."""
    first: dict[_Role, Block] = {}
    for block in blocks:
        first.setdefault(_role(block), block)
    return tuple(first.values())


def _role(block: Block) -> _Role:
    """A weight in one kind of use; a tied embedding and decoder are two."""
    return block.weights, operation_name(block.consumer), block.place


def _uses_by_role(blocks: tuple[Block, ...]) -> dict[_Role, list[Block]]:
    roles: dict[_Role, list[Block]] = defaultdict(list)
    for block in blocks:
        roles[_role(block)].append(block)
    return roles


def _class_of(block: Block, loop: set[fx.Node], leading: set[fx.Node]) -> ConnectionClass:
    if operation_name(block.consumer) in LAYERS:
        reads_input = block.place == (INPUT_WEIGHT[operation_name(block.consumer)],)
        return ConnectionClass.INPUT if reads_input else ConnectionClass.RECURRENT
    if block.consumer in loop:
        return ConnectionClass.RECURRENT
    if block.consumer in leading:
        return ConnectionClass.INPUT
    return ConnectionClass.FEEDFORWARD


def _between(uses: list[Block]) -> set[fx.Node]:
    """Nodes on a path from one use of a tensor to another; the uses themselves included."""
    consumers = {b.consumer for b in uses if operation_name(b.consumer) not in LAYERS}
    if len(consumers) < 2:
        return set()
    after = _closure(consumers, lambda n: n.users)
    before = _closure(consumers, lambda n: n.all_input_nodes)
    later = {c for c in consumers if c in _strictly(consumers, lambda n: n.users)}
    if not later:
        return set()
    return after & before


def _strictly(starts: set[fx.Node], step: Any) -> set[fx.Node]:
    return _closure({m for n in starts for m in step(n)}, step)


def _closure(starts: set[fx.Node], step: Any) -> set[fx.Node]:
    seen, todo = set(starts), list(starts)
    while todo:
        for node in step(todo.pop()):
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return seen


def _leading_to_recurrent(graph: fx.Graph, recurrent_values: set[fx.Node]) -> set[fx.Node]:
    """Values that reach a recurrent neuron without passing another block of connections."""
    leading: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(_leads(node, user, leading, recurrent_values) for user in node.users):
            leading.add(node)
    return leading


def _leads(
    node: fx.Node, user: fx.Node, leading: set[fx.Node], recurrent_values: set[fx.Node]
) -> bool:
    """Whether a value reaches a recurrent neuron by way of one of its users."""
    if user.op != "call_function":
        return False
    name = operation_name(user)
    if name in LAYERS:
        return _is_state(user, node)
    if name in _CONTRACTIONS and _through_weight(user, node):
        return False
    return user in leading or (user in recurrent_values and name not in MOVING)


def _is_state(layer: fx.Node, node: fx.Node) -> bool:
    positions = {"lstm": (1, 2)}.get(operation_name(layer), (1,))
    states = [layer.args[i] for i in positions]
    return any(node in s if isinstance(s, (list, tuple)) else s is node for s in states)


_CONTRACTIONS = {
    "linear": 1,
    "matmul": 1,
    "mm": 1,
    "addmm": 2,
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "convolution": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
    "embedding": 0,
}


def _through_weight(user: fx.Node, node: fx.Node) -> bool:
    """Whether the contraction's other operand is a weight, so that this is a block of its own."""
    position = _CONTRACTIONS[operation_name(user)]
    operands = [user.args[position]]
    if operation_name(user) in ("matmul", "mm"):
        operands = [a for a in user.args[:2] if a is not node]
    return any(_is_parameter(o) for o in operands)


def _is_parameter(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function":
        tensors = [n for n in node.all_input_nodes if n.meta.get("val") is not None]
        if len(tensors) != 1:
            return False
        node = tensors[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"
