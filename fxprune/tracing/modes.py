"""Which operations follow ``train()`` and ``eval()``, found by comparing the two traces."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxprune.operations import is_mutable
from fxprune.tracing.importing import place_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["LOST_SWITCH", "Step", "compare_modes", "steps_of", "switchable", "without_dropout"]

aten = torch.ops.aten

LOST_SWITCH = "dropout or batch norm on a path that tracing removed"
"""Where the modes differ if not every operation that follows them can be found again."""

_FLAG = {
    "dropout": 2,
    "dropout_": 2,
    "feature_dropout": 2,
    "feature_dropout_": 2,
    "alpha_dropout": 2,
    "alpha_dropout_": 2,
    "batch_norm": 5,
    "scaled_dot_product_attention": 4,
}
"""Position of the argument that follows the mode in each operation that has one."""


@dataclass(frozen=True)
class Step:
    """One node of a trace, with its inputs by position: comparable between traces."""

    target: Any
    arguments: tuple[Any, ...]
    place: str
    follows: int | None  # position of the argument that may follow the mode


def steps_of(exported: ExportedProgram) -> list[Step]:
    """What a trace does, without what leads nowhere and what only one mode counts: batches seen."""
    places: dict[fx.Node, int] = {}
    steps: list[Step] = []
    live = _live(exported.graph)
    for node in exported.graph.nodes:
        if node not in live or _is_counter(node) or _is_size(node):
            continue
        places[node] = len(steps)
        arguments = () if node.op == "placeholder" else _arguments(node, places)
        steps.append(Step(node.target, arguments, place_of(node), _FLAG.get(_name(node))))
    return steps


def compare_modes(
    evaluating: list[Step], training: list[Step]
) -> tuple[list[float | None], str | None]:
    """Compares a model's two traces.

    Returns:
        For every dropout, batch norm and attention call of the evaluation trace, in order, its
        flag or probability in train mode where that differs, else None; and None if nothing
        else differs, or else where the traces part.
    """
    follows: list[float | None] = []
    for ours, theirs in zip_longest(evaluating, training):
        if ours is None or theirs is None:
            extra = ours or theirs
            return follows, f"{extra.target} is called in one mode only{extra.place}"
        left, right = ours.arguments, theirs.arguments
        if ours.follows is not None and ours.target == theirs.target:
            flag, other = _flag(left, ours.follows), _flag(right, ours.follows)
            follows.append(other if other != flag else None)
            if not flag:  # off in eval mode: what is on there and off in train mode is no switch
                left, right = _without(left, ours.follows), _without(right, ours.follows)
        if ours.target != theirs.target or left != right:
            return follows, f"{ours.target} becomes {theirs.target}{ours.place}"
    return follows, None


def switchable(graph: fx.Graph) -> list[fx.Node]:
    """The dropout, batch norm and attention calls that lead to an output of a graph, in order."""
    live = _live(graph)
    return [n for n in graph.nodes if n in live and n.op == "call_function" and _name(n) in _FLAG]


def without_dropout(module: fx.GraphModule) -> fx.GraphModule:
    """The module over the same tensors with dropout off that is on in every mode; or itself.

    Two programs of unequal sizes draw unequal random numbers, so they are compared without.
    """
    if not any(_drops(n) for n in module.graph.nodes):
        return module
    graph = copy.deepcopy(module.graph)
    for node in filter(_drops, graph.nodes):
        node.update_arg(_FLAG[_name(node)], False)
    return fx.GraphModule(module, graph).eval()


def _drops(node: fx.Node) -> bool:
    name = _name(node) if node.op == "call_function" else ""
    return name in _FLAG and name != "batch_norm" and bool(_flag(node.args, _FLAG[name]))


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Inputs, what leads to an output, and what changes a value in place, but no counter."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        changes = is_mutable(node) and not _is_counter(node.args[0])
        if node.op in ("placeholder", "output") or changes or not live.isdisjoint(node.users):
            live.add(node)
    return live


def _is_counter(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.name.endswith("num_batches_tracked")


def _is_size(node: fx.Node) -> bool:
    """Arithmetic on sizes: train mode checks them more often, and computes nothing from them."""
    value = node.meta.get("val")
    sizes = isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    return node.op == "call_function" and (sizes or node.target == aten._assert_scalar.default)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else ""


def _arguments(node: fx.Node, places: dict[fx.Node, int]) -> tuple[Any, ...]:
    return tuple(fx.map_arg(node.args, lambda n: _Place(places.get(n, -1))))


def _flag(arguments: tuple[Any, ...], position: int) -> float:
    # Only attention may leave it out, and then nothing is dropped.
    return float(arguments[position]) if len(arguments) > position else 0.0


def _without(arguments: tuple[Any, ...], position: int) -> tuple[Any, ...]:
    kept = [None if i == position else a for i, a in enumerate(arguments)]
    while kept and kept[-1] is None:
        kept.pop()
    return tuple(kept)


class _Place(int):
    """A node by its position, equal in both traces."""
