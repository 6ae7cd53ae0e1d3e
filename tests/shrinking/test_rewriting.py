"""Integer arguments after positions along a dimension are gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxprune.errors import DependencyError
from fxprune.shrinking.rewriting import RULES

aten = torch.ops.aten


class Kept:
    """Positions by node and dimension."""

    def __init__(self, positions: Mapping[tuple[str, int], list[int]]) -> None:
        self.known = positions

    def positions(self, value: Any, dim: int, part: int | None = None) -> Tensor | None:
        """Kept positions of a named node."""
        found = self.known.get((value.name, dim)) if isinstance(value, fx.Node) else None
        return None if found is None else torch.tensor(found)

    def size(self, value: Any) -> int:
        """All sizes are plain numbers here."""
        return int(value)


def call(target: Any, x: Tensor, *args: Any) -> fx.Node:
    """One operation over an input of the same shape as ``x``, with example values."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = x
    node = graph.create_node("call_function", target, (source, *args), name="y")
    node.meta["val"] = target(x, *args)
    return node


def rewritten(node: fx.Node, **kept: list[int]) -> tuple[Any, ...]:
    """The new arguments behind the input; ``x1=[0, 2]`` keeps 0 and 2 of dimension 1 of x."""
    known = {(key[0], int(key[1])): value for key, value in kept.items()}
    rule: Callable[[fx.Node, Any], tuple[Any, ...]] = RULES[node.target._schema.name.split("::")[1]]  # type: ignore[union-attr]
    return rule(node, Kept(known))[1:]


X = torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("bounds", "kept", "expected"),
    [
        ((1, 1, 4), [0, 2, 5], (1, 1, 2, 1)),
        ((1, 0, 3), [1, 2], (1, 0, 2, 1)),
        ((1, -3, 9223372036854775807), [0, 3, 5], (1, 1, 3, 1)),
        ((1, None, None), [0, 3], (1, 0, 2, 1)),
        ((1, 4, 6), [0, 1], (1, 2, 2, 1)),
    ],
)
def test_slices(bounds: tuple[Any, ...], kept: list[int], expected: tuple[int, ...]) -> None:
    assert rewritten(call(aten.slice.Tensor, X, *bounds), x1=kept) == expected


@pytest.mark.parametrize(
    ("start", "length", "kept", "expected"),
    [(1, 3, [0, 2, 5], (1, 1, 1)), (-3, 3, [0, 3, 5], (1, 1, 2)), (0, 6, [4], (1, 0, 1))],
)
def test_narrow(start: int, length: int, kept: list[int], expected: tuple[int, ...]) -> None:
    assert rewritten(call(aten.narrow.default, X, 1, start, length), x1=kept) == expected


@pytest.mark.parametrize(("index", "expected"), [(3, 1), (-1, 2), (0, 0)])
def test_select(index: int, expected: int) -> None:
    kept = [0, 3, 5]
    assert rewritten(call(aten.select.int, X, 1, index), x1=kept) == (1, expected)


def test_untouched_dimensions_keep_their_arguments() -> None:
    assert rewritten(call(aten.slice.Tensor, X, 0, 0, 1), x1=[0]) == (0, 0, 1)
    assert rewritten(call(aten.select.int, X, 0, 1), x1=[0]) == (0, 1)
    assert rewritten(call(aten.view.default, X, [3, 4])) == ([3, 4],)


def test_sizes_of_views() -> None:
    view = call(aten.view.default, X, [2, 2, 3])
    assert rewritten(view, y2=[0, 2]) == ([2, 2, 2],)
    inferred = call(aten.view.default, X, [-1, 6])
    assert rewritten(inferred, y1=[0, 2]) == ([-1, 2],)
    assert rewritten(call(aten.expand.default, X[:, :1], [2, 6]), y1=[0, 1]) == ([2, 2],)


def test_two_sizes_cannot_both_be_inferred() -> None:
    graph = fx.Graph()
    source = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (source, 0))
    node = graph.create_node("call_function", aten.view.default, (source, [-1, size]), name="y")
    node.meta["val"] = X
    with pytest.raises(DependencyError, match="two of its sizes would be inferred"):
        rewritten(node, y1=[0])


def test_unflatten() -> None:
    node = call(aten.unflatten.int, X, 1, [2, 3])
    assert rewritten(node, y2=[0, 2]) == (1, [2, 2])
    assert rewritten(call(aten.unflatten.int, X, -1, [2, -1]), y2=[0]) == (-1, [2, -1])


def test_repeats() -> None:
    assert rewritten(call(aten.repeat.default, X, [1, 2]), x1=[0, 1], y1=[0, 1, 6, 7]) == ([1, 2],)
    assert rewritten(call(aten.tile.default, X, [2]), x1=[0], y1=[0, 6]) == ([1, 2],)
    grown = call(aten.repeat.default, X[0], [3, 1])
    assert rewritten(grown, x0=[0, 1], y1=[0, 1]) == ([3, 1],)


def test_layer_norm() -> None:
    assert rewritten(call(aten.layer_norm.default, X, [6]), x1=[0, 1]) == ([2],)


def test_depthwise_groups_follow_the_channels() -> None:
    def conv(weight: Tensor, groups: int) -> fx.Node:
        graph = fx.Graph()
        nodes = [graph.placeholder(name) for name in ("x", "w")]
        x = torch.zeros(1, 6, 4)
        nodes[0].meta["val"], nodes[1].meta["val"] = x, weight
        options = ([1], [0], [1], groups)
        node = graph.call_function(aten.conv1d.default, (*nodes, None, *options))
        node.name = "y"
        node.meta["val"] = aten.conv1d.default(x, weight, None, *options)
        return node

    assert rewritten(conv(torch.zeros(6, 1, 2), 6), x1=[0, 4])[-1] == 2
    assert rewritten(conv(torch.zeros(6, 3, 2), 2), x1=[0, 3])[-1] == 2
