"""Rewrites that make a fresh program easier to analyse and change nothing it computes.

The states of recurrent layers are stacked by torch's interface and mostly taken apart again by the
user's code. Each layer's state is a tensor of its own size here, so what was stacked only to be
selected is connected directly:

* ``stack([a, b])[i]`` along the stacked dimension is ``a`` or ``b``;
* ``stack([a, b]).view(layers, directions, ...)[i][j]`` likewise;
* ``stack([a, b])[i:j]`` is ``stack`` of the part; ``stack([a]).squeeze(0)`` is ``a``;
* ``stack([a, b]).transpose(0, 1).reshape(batch, -1)`` is ``cat([a, b], 1)``, whose parts may differ
  in size;
* ``zeros(n, ...)[i]`` used as an initial state is no initial state.

What takes its shape from another value (``view_as``, ``reshape_as``, ``expand_as``) gets it as
sizes: only those that vary are read from that value, which may lose neurons of its own.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.operations import argument
from fxprune.tracing import recurrent

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["simplify"]

aten = torch.ops.aten

_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
_MOVES = (
    aten.select.int,
    aten.slice.Tensor,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.to.dtype,
    aten.clone.default,
    aten.unbind.int,
    aten.split.Tensor,
    aten.chunk.default,
    operator.getitem,
)


def simplify(graph: fx.Graph) -> None:
    """Applies the rewrites of this module to a graph, in place."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.unbind.int:
            _unbind_to_selects(graph, node)
        elif node.target in _AS_ANOTHER:
            _give_sizes(graph, node)
        elif node.target in (aten.select.int, aten.slice.Tensor, aten.squeeze.dim):
            _take_from_stack(graph, node)
        elif node.target in _RESHAPES:
            _flatten_stack(graph, node)
    for node in list(graph.nodes):
        if node.target in (recurrent.lstm, recurrent.gru, recurrent.rnn):
            _drop_zero_states(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
            graph.erase_node(node)


_AS_ANOTHER: dict[Any, Any] = {
    aten.view_as.default: aten.view.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}


def _give_sizes(graph: fx.Graph, node: fx.Node) -> None:
    """Replaces a shape taken from another value by its sizes."""
    source, other = node.args
    assert isinstance(other, fx.Node)
    with graph.inserting_before(node):
        sizes = [_size(graph, other, dim) for dim in range(_rank(other))]
        sized = graph.call_function(_AS_ANOTHER[node.target], (source, sizes))
    sized.meta = dict(node.meta)
    node.replace_all_uses_with(sized)
    graph.erase_node(node)


def _size(graph: fx.Graph, value: fx.Node, dim: int) -> int | fx.Node:
    size = value.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    node = graph.call_function(aten.sym_size.int, (value, dim))
    node.meta["val"] = size
    return node


def _unbind_to_selects(graph: fx.Graph, node: fx.Node) -> None:
    dim = argument(node, "dim")
    for item in list(node.users):
        with graph.inserting_before(item):
            select = graph.call_function(aten.select.int, (node.args[0], dim, item.args[1]))
        select.meta = dict(item.meta)
        item.replace_all_uses_with(select)
        graph.erase_node(item)
        _take_from_stack(graph, select)
    graph.erase_node(node)


_RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
)


def _flatten_stack(graph: fx.Graph, node: fx.Node) -> None:
    """Replaces a stack of [batch, size] parts laid side by side, [batch, parts * size]."""
    source, swapped = node.args[0], False
    while isinstance(source, fx.Node) and source.target is not aten.stack.default:
        if source.target is aten.transpose.int and {0, 1} == {int(d) % 3 for d in source.args[1:]}:  # type: ignore[arg-type]
            swapped = not swapped
        elif source.target is aten.permute.default and source.args[1] == [1, 0, 2]:
            swapped = not swapped
        elif source.target not in (aten.contiguous.default, aten.clone.default):
            return
        source = source.args[0]
    if not isinstance(source, fx.Node) or int(argument(source, "dim")) not in (0, 1):
        return
    parts: list[fx.Node] = list(source.args[0])  # type: ignore[arg-type]
    side_by_side = swapped == (int(argument(source, "dim")) == 0)
    part, shape = parts[0].meta["val"].shape, node.meta["val"].shape
    if len(part) != 2 or len(shape) != 2 or not side_by_side:
        return
    if str(shape[0]) != str(part[0]) or str(shape[1]) != str(part[1] * len(parts)):
        return
    with graph.inserting_before(node):
        joined = graph.call_function(aten.cat.default, (parts, 1))
    joined.meta = dict(node.meta)
    node.replace_all_uses_with(joined)
    graph.erase_node(node)


def _take_from_stack(graph: fx.Graph, node: fx.Node) -> None:
    """Replaces a select, slice or squeeze of a stack by the parts it takes."""
    source = node.args[0]
    grid = _grid(source) if isinstance(source, fx.Node) else None
    if grid is None:
        return
    parts, lead, axis = grid
    dim = int(argument(node, "dim")) % (len(lead) + _rank(parts[0]))
    if not axis <= dim < axis + len(lead):
        return
    which = dim - axis
    if node.target is aten.select.int:
        taken = _index_grid(parts, lead, which, [int(node.args[2])])  # type: ignore[arg-type]
        rest = [s for i, s in enumerate(lead) if i != which]
    elif node.target is aten.squeeze.dim:
        if lead[which] != 1:
            return
        taken, rest = list(parts), [s for i, s in enumerate(lead) if i != which]
    else:
        bounds = [argument(node, name) for name in ("start", "end", "step")]
        if not all(b is None or isinstance(b, int) for b in bounds):
            return
        span = range(lead[which])[slice(*bounds)]
        taken = _index_grid(parts, lead, which, list(span))
        rest = [len(span) if i == which else s for i, s in enumerate(lead)]
    if taken and len(rest) < 2:
        node.replace_all_uses_with(_stack(graph, node, taken, rest, axis))
        graph.erase_node(node)


def _stack(
    graph: fx.Graph, node: fx.Node, parts: Sequence[fx.Node], lead: Sequence[int], axis: int
) -> fx.Node:
    if not lead:
        return parts[0]
    with graph.inserting_before(node):
        whole = graph.call_function(aten.stack.default, (list(parts), axis))
    whole.meta = dict(node.meta)
    return whole


def _grid(node: fx.Node) -> tuple[list[fx.Node], list[int], int] | None:
    """The parts of a stack, the sizes of the leading grid they form, and where it starts."""
    if node.target is aten.stack.default:
        parts = list(node.args[0])  # type: ignore[arg-type]
        axis = int(argument(node, "dim")) % (_rank(parts[0]) + 1)
        return parts, [len(parts)], axis
    if node.target in (aten.view.default, aten.reshape.default, aten.unflatten.int):
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.target is not aten.stack.default:
            return None
        parts = list(source.args[0])  # type: ignore[arg-type]
        if int(argument(source, "dim")) != 0:
            return None
        return _view_grid(node, parts)
    return None


def _view_grid(node: fx.Node, parts: list[fx.Node]) -> tuple[list[fx.Node], list[int], int] | None:
    """A view that only splits the stacked dimension: [layers, directions, batch, hidden]."""
    shape, part = list(node.meta["val"].shape), list(parts[0].meta["val"].shape)
    count = len(shape) - len(part)
    lead = shape[:count]
    same = [str(s) for s in shape[count:]] == [str(s) for s in part]
    if count < 1 or not same or not all(isinstance(s, int) for s in lead):
        return None
    total = 1
    for size in lead:
        total *= size
    return (parts, lead, 0) if total == len(parts) else None


def _index_grid(
    parts: Sequence[fx.Node], lead: Sequence[int], which: int, keep: list[int]
) -> list[fx.Node]:
    index = torch.arange(len(parts)).reshape(list(lead))
    kept = index.index_select(
        which, torch.tensor([k % lead[which] for k in keep], dtype=torch.int64)
    )
    return [parts[i] for i in kept.flatten().tolist()]


def _drop_zero_states(node: fx.Node) -> None:
    states = (1, 2) if node.target is recurrent.lstm else (1,)
    for position in states:
        state = node.args[position]
        if isinstance(state, fx.Node) and _is_zero(state):
            node.update_arg(position, None)


def _is_zero(node: fx.Node) -> bool:
    while node.target in _MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "call_function" and node.target in _ZEROS


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.dim()
