"""What rules of operations that contract share: where weights and values meet, and its note."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.analysis.places import argument_at
from fxprune.analysis.walker import Use

if TYPE_CHECKING:
    from fxprune.analysis.places import Place
    from fxprune.analysis.walker import Walker

__all__ = ["NOBODY", "connect", "is_weight", "join_parts", "meet", "weight_axis"]

NOBODY = torch.tensor(-1)
"""Stands where a weight reads or feeds no neuron."""


def connect(
    w: Walker, node: fx.Node, place: Place, sources: Tensor | None, destinations: Tensor
) -> None:
    """Notes the use of a weight; ``sources`` and ``destinations`` broadcast to the operand."""
    operand = argument_at(node.args, place)
    if sources is None:
        sources = NOBODY.reshape((1,) * destinations.dim())
    if w.roots(operand):
        w.uses.append(Use(operand, node, place, sources, destinations))
    else:  # computed from other tensors: a value that is read
        w.read(node, operand, sources, "reduction")


def is_weight(w: Walker, node: Any) -> bool:
    return any(a.role is not None for a in w.label(node))


def weight_axis(w: Walker, weight: Any, dim: int) -> Tensor:
    """Neurons along one dimension of a weight, one per position; frozen if it has none."""
    size = w.shape(weight)[dim]
    axes = [a for a in w.label(weight) if dim in a.dims]
    if size == 1:
        axes = [a for a in w.label(weight) if a.role == dim and a.ids.numel() == 1]
    if len(axes) == 1 and axes[0].ids.numel() == size:
        return axes[0].ids.reshape(-1)
    mixed, computed = (
        "weight whose rows and columns cannot be told apart",
        "weight that is computed",
    )
    for axis in axes:
        w.ledger.freeze(axis.ids, mixed)
    ids = w.ledger.fresh(size)
    w.ledger.freeze(ids, mixed if axes else computed)
    return ids


def meet(w: Walker, x: Any, dim: int, columns: Tensor) -> None:
    """The neurons of ``x`` along ``dim`` are those the weight's columns read."""
    axes = w.axes_at(x, dim)
    rank = len(w.shape(x))
    ids = columns.reshape([-1 if d == dim else 1 for d in range(rank)])
    if len(axes) == 1:
        w.ledger.unify(axes[0].ids, ids)
        return
    single = [a for a in w.label(x) if a.ids.numel() == 1 and not axes]
    if columns.numel() == 1 and single:
        w.ledger.unify(single[0].ids.reshape(-1), columns)
        return
    reason = "reads a dimension without neurons" if not axes else "reads several neurons at once"
    w.ledger.freeze(columns, reason)
    for axis in axes:
        w.ledger.freeze(axis.ids, reason)


def join_parts(w: Walker, ids: Tensor) -> None:
    """Heads: where the contracted dimension is one part of a split one, each part is one neuron."""
    if ids.numel() > ids.shape[-1]:
        w.ledger.unify(ids, ids[..., :1])
