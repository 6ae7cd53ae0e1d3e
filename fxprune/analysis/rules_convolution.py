"""Rules for convolutions: channels are neurons, the positions of the kernel belong to both ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprune.analysis.contracting import connect, meet, weight_axis
from fxprune.analysis.labels import Axis
from fxprune.analysis.walker import CONVOLUTIONS
from fxprune.operations import operation_name

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES"]


def convolution(w: Walker, node: fx.Node) -> Label:
    """Convolutions of any rank, grouped, depthwise or transposed."""
    name = operation_name(node)
    args: dict[int, Any] = dict(enumerate(node.args))
    x, weight, bias = args[0], args[1], args.get(2)
    plain = name != "convolution"
    transposed = "transpose" in name if plain else bool(args[6])
    groups = int(args.get(6, 1) if plain else args[8])
    spatial = len(w.shape(weight)) - 2
    channel = len(w.shape(x)) - 1 - spatial
    for axis in w.label(x):
        for d in range(channel + 1, len(w.shape(x))):
            if d in axis.dims:
                # A kernel slides over these positions: whatever varies along them is one.
                w.ledger.unify(axis.ids, axis.ids.narrow(d, 0, 1))
    outer, inner = (1, 0) if transposed else (0, 1)
    if groups == 1:
        result = _dense_convolution(w, node, x, weight, channel, inner, outer)
    else:
        result = _grouped_convolution(w, node, x, weight, channel, groups, transposed)
    if isinstance(bias, fx.Node):
        for axis in w.label(bias):
            w.ledger.unify(axis.ids.reshape(-1), result)
    rank = len(w.shape(node))
    return (Axis(result.reshape([-1 if d == channel else 1 for d in range(rank)])),)


def _dense_convolution(
    w: Walker, node: fx.Node, x: Any, weight: Any, channel: int, inner: int, outer: int
) -> Tensor:
    rows, columns = weight_axis(w, weight, outer), weight_axis(w, weight, inner)
    rank = len(w.shape(weight))
    _meet_channels(w, x, channel, columns)
    connect(
        w,
        node,
        (1,),
        columns.reshape([-1 if d == inner else 1 for d in range(rank)]),
        rows.reshape([-1 if d == outer else 1 for d in range(rank)]),
    )
    return rows


def _meet_channels(w: Walker, x: Any, channel: int, columns: Tensor) -> None:
    axes = w.axes_at(x, channel)
    if len(axes) == 1:
        ids = axes[0].ids
        first = ids[tuple(slice(None) if d == channel else slice(0, 1) for d in range(ids.dim()))]
        w.ledger.unify(first.reshape(-1), columns)
    else:
        meet(w, x, channel, columns)


def _grouped_convolution(
    w: Walker, node: fx.Node, x: Any, weight: Any, channel: int, groups: int, transposed: bool
) -> Tensor:
    """Depthwise: a channel and its filters are one. Else: one position of all groups is one."""
    size = w.shape(weight)
    inputs = w.shape(x)[channel]
    outputs = w.shape(node)[channel]
    rows = w.ledger.fresh(outputs)
    columns = w.ledger.fresh(inputs)
    _meet_channels(w, x, channel, columns)
    per_in, per_out = inputs // groups, outputs // groups
    if per_in == 1:
        w.ledger.unify(columns.repeat_interleave(per_out), rows)
    else:
        w.ledger.unify(columns.reshape(groups, per_in), columns[:per_in].reshape(1, -1))
        w.ledger.unify(rows.reshape(groups, per_out), rows[:per_out].reshape(1, -1))
    tail = (1,) * (len(size) - 2)
    if transposed:  # weight [in, out / groups, ...]
        far = columns.reshape(inputs, 1, *tail)
        near = rows.reshape(groups, 1, per_out).expand(groups, per_in, per_out)
        near = near.reshape(inputs, per_out, *tail)
        own = (far.reshape(-1), rows[:per_out])
    else:  # weight [out, in / groups, ...]
        near = rows.reshape(outputs, 1, *tail)
        far = columns.reshape(groups, 1, per_in).expand(groups, per_out, per_in)
        far = far.reshape(outputs, per_in, *tail)
        own = (rows, columns[:per_in])
    for dim, ids in enumerate(own):
        if size[dim] > 1:
            w.ledger.unify(weight_axis(w, weight, dim), ids)
        else:
            for axis in w.label(weight):
                if axis.role == dim and size[dim] == 1 and ids.numel() == 1 and per_in > 1:
                    w.ledger.unify(axis.ids.reshape(-1), ids)
    connect(w, node, (1,), far, near)
    return rows


RULES: dict[str, Any] = dict.fromkeys(CONVOLUTIONS, convolution)
