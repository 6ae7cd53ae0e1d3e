"""Rewriting the integer arguments of operations after dimensions have shrunk.

Each rule gets the node, and for every dimension of a value which positions are kept; it returns
the node's new arguments. Operations without integers about neuron dimensions need no rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, fx

from fxprune.analysis.walker import CONVOLUTIONS
from fxprune.errors import DependencyError
from fxprune.operations import operation_name

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RULES", "Kept"]

aten = torch.ops.aten
Arguments = tuple[Any, ...]


class Kept(Protocol):
    """What a rule may ask about values."""

    def positions(self, value: fx.Node | int, dim: int, part: int | None = None) -> Tensor | None:
        """Kept positions along a dimension, int64; None if the dimension keeps all.

        ``part`` picks one result of an operation that returns several.
        """

    def size(self, value: Any) -> int:
        """An integer argument at the example's sizes."""


def _sizes_at(position: int) -> Callable[[fx.Node, Kept], Arguments]:
    """Sizes of the result, given as a list: view, reshape, expand, zeros, ..."""

    def rewrite(node: fx.Node, kept: Kept) -> Arguments:
        sizes: list[Any] = list(node.args[position])  # type: ignore[arg-type]
        rank = node.meta["val"].dim()
        lead = rank - len(sizes)
        for i, size in enumerate(sizes):
            positions = kept.positions(node, i + lead)
            if positions is None or (isinstance(size, int) and size == -1):
                continue
            if isinstance(size, int):
                sizes[i] = len(positions)
            elif -1 in [s for s in sizes if isinstance(s, int)]:
                raise DependencyError(
                    f"{node.target} cannot be rewritten: two of its sizes would be inferred",
                    nodes=(node.name,),
                    dims=(i,),
                )
            else:
                sizes[i] = -1
        return (*node.args[:position], sizes, *node.args[position + 1 :])

    return rewrite


def _expand(node: fx.Node, kept: Kept) -> Arguments:
    return _sizes_at(1)(node, kept)


def _unflatten(node: fx.Node, kept: Kept) -> Arguments:
    x, dim, sizes = node.args[:3]
    rank = node.meta["val"].dim()
    first = int(dim) % (rank - len(sizes) + 1)  # type: ignore[arg-type]
    new = []
    for i, size in enumerate(sizes):  # type: ignore[arg-type]
        positions = kept.positions(node, first + i)
        new.append(size if positions is None or size == -1 else len(positions))
    return (x, dim, new)


def _slice(node: fx.Node, kept: Kept) -> Arguments:
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    x, dim, start, end, step = given
    positions = kept.positions(x, int(dim) % node.meta["val"].dim())
    if positions is None:
        return node.args
    size = _full_size(x, int(dim), kept)
    low, high, _ = slice(_bound(start, kept), _bound(end, kept)).indices(size)
    new_low = int((positions < low).sum())
    return (x, dim, new_low, new_low + int(((positions >= low) & (positions < high)).sum()), step)


def _narrow(node: fx.Node, kept: Kept) -> Arguments:
    x, dim, start, length = node.args
    positions = kept.positions(x, int(dim) % node.meta["val"].dim())  # type: ignore[arg-type]
    if positions is None:
        return node.args
    low = kept.size(start) % _full_size(x, int(dim), kept)  # type: ignore[arg-type]
    inside = (positions >= low) & (positions < low + kept.size(length))
    return (x, dim, int((positions < low).sum()), int(inside.sum()))


def _bound(value: Any, kept: Kept) -> int | None:
    return None if value is None else kept.size(value)


def _full_size(x: Any, dim: int, kept: Kept) -> int:
    return kept.size(x.meta["val"].shape[dim])


def _select(node: fx.Node, kept: Kept) -> Arguments:
    x, dim, index = node.args[:3]
    positions = kept.positions(x, int(dim) % x.meta["val"].dim())  # type: ignore[arg-type,union-attr]
    if positions is None:
        return node.args
    wanted = kept.size(index) % _full_size(x, int(dim), kept)  # type: ignore[arg-type]
    return (x, dim, int((positions < wanted).sum()))


def _layer_norm(node: fx.Node, kept: Kept) -> Arguments:
    normalized = list(node.args[1])  # type: ignore[arg-type]
    rank = node.meta["val"].dim()
    for i in range(len(normalized)):
        positions = kept.positions(node.args[0], rank - len(normalized) + i)  # type: ignore[arg-type]
        if positions is not None:
            normalized[i] = len(positions)
    return (node.args[0], normalized, *node.args[2:])


def _repeat(node: fx.Node, kept: Kept) -> Arguments:
    x, repeats = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    rank = node.meta["val"].dim()
    repeats = [1] * (rank - len(repeats)) + repeats  # tile takes fewer than dimensions
    lead = rank - x.meta["val"].dim()  # type: ignore[union-attr]
    for d in range(rank):
        positions = kept.positions(node, d)
        source = kept.positions(x, d - lead) if d >= lead else None  # type: ignore[arg-type]
        if positions is not None:
            was = _full_size(x, d - lead, kept) if d >= lead else 1
            now = len(source) if source is not None else was
            repeats[d] = len(positions) // now
    return (x, repeats)


def _depthwise(node: fx.Node, kept: Kept) -> Arguments:
    """A depthwise convolution has as many groups as channels left."""
    name = operation_name(node)
    args = list(node.args)
    place = 8 if name == "convolution" else 6
    if len(args) <= place or args[place] == 1:
        return node.args
    weight: Any = node.args[1]
    transposed = "transpose" in name or (name == "convolution" and args[6])
    shape = weight.meta["val"].shape
    per_group = shape[0] // args[place] if transposed else shape[1]
    channel = node.meta["val"].dim() - (len(shape) - 2) - 1
    positions = kept.positions(args[0], channel)  # type: ignore[arg-type]
    if per_group == 1 and positions is not None:
        args[place] = len(positions)
    return tuple(args)


RULES: dict[str, Callable[[fx.Node, Kept], Arguments]] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "new_zeros", "new_ones", "new_full", "new_empty"),
        _sizes_at(1),
    ),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), _sizes_at(0)),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    "unflatten": _unflatten,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(CONVOLUTIONS, _depthwise),
}
