"""Masks of weights, followed to where an operation reads the weights rearranged.

A weight may be read transposed, reshaped, or put together of several tensors. What is done to the
tensors is done to their masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.analysis.neurons import Block

__all__ = ["operand_mask"]


def operand_mask(block: Block, connections: Mapping[str, Tensor]) -> Tensor | None:
    """Which connections of a block masks keep, bool of the operand's shape; None if all.

    Args:
        block: the block.
        connections: masks by the name of the tensor.

    Raises:
        DependencyError: the masks do not come to the shape that the operation reads.
    """
    if block.direct:
        return connections.get(block.weight)
    if not any(name in connections for name in block.weights):
        return None
    values: dict[fx.Node, Any] = {}
    for node in _ancestry(block.operand):
        values[node] = _value(node, values, connections)
    mask: Tensor = values[block.operand]
    if tuple(mask.shape) != block.shape:
        raise DependencyError(
            f"the mask of {block.name!r} has shape {list(mask.shape)} where "
            f"{block.consumer.name!r} reads the weight as {list(block.shape)}. Please report the "
            "model.",
            nodes=(block.operand.name, block.consumer.name),
        )
    return mask


def _value(node: fx.Node, values: Mapping[fx.Node, Any], connections: Mapping[str, Tensor]) -> Any:
    value = node.meta.get("val")
    if node.op == "get_attr" and isinstance(value, Tensor):
        mask = connections.get(str(node.target))
        return torch.ones(tuple(value.shape), dtype=torch.bool) if mask is None else mask
    if node.op == "placeholder" or not isinstance(value, Tensor):
        return _at_the_example(value)
    arguments, options = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    return node.target(*arguments, **options)  # type: ignore[operator]


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


def _at_the_example(value: Any) -> Any:
    """A size as the example has it; for an input, ones."""
    if isinstance(value, Tensor):
        return torch.ones(tuple(int(n) for n in value.shape), dtype=torch.bool)
    return pytree.tree_map_only(torch.SymInt, int, value)
