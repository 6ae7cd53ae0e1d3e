"""Rules for operations that only move data: they are executed on the neuron numbers themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.analysis.labels import Axis, collapse
from fxprune.operations import argument, dims_of, operation_name

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES", "constant_value"]

aten = torch.ops.aten


def same(w: Walker, node: fx.Node) -> Label:
    """The value of the first argument in other clothes: a copy, a cast, a dropout."""
    return w.label(node.args[0])


def move(w: Walker, node: fx.Node) -> Any:
    """Views, transposes, slices, splits: run on each axis, at the example's sizes."""
    source = node.args[0]
    shape = w.shape(source)  # type: ignore[arg-type]
    axes = w.label(source)
    results = [_execute(w, node, axis.ids.expand(shape)) for axis in axes]
    if isinstance(node.meta["val"], (list, tuple)):
        parts = range(len(node.meta["val"]))
        return [_moved(w, axes, [r[i] for r in results]) for i in parts]
    return _moved(w, axes, results)


def _moved(w: Walker, axes: Label, moved: list[Tensor]) -> Label:
    return w.settle(a.at(collapse(ids)) for a, ids in zip(axes, moved, strict=True))


def rigid(w: Walker, node: fx.Node) -> Any:
    """Moves whose amounts depend on every position being there: the neurons stay."""
    for axis in w.label(node.args[0]):
        w.refuse(node, f"{operation_name(node)} needs all neurons", axis.ids)
    return move(w, node)


def shift(w: Walker, node: fx.Node) -> Any:
    """Rolling and windows: along a neuron dimension all must stay, along others they pass."""
    x = node.args[0]
    given = argument(node, "dims" if operation_name(node) == "roll" else "dimension")
    moved = dims_of(given, len(w.shape(x)))  # type: ignore[arg-type]
    for axis in w.label(x):
        if moved & set(axis.dims):
            w.refuse(node, f"{operation_name(node)} needs all neurons", axis.ids)
    return move(w, node)


def cut(w: Walker, node: fx.Node) -> Any:
    """A slice; one that skips neurons needs them all."""
    dim = int(argument(node, "dim")) % len(w.shape(node))
    if argument(node, "step") != 1:
        for axis in w.axes_at(node.args[0], dim):
            w.refuse(node, "every other neuron is taken", axis.ids)
    return move(w, node)


def _execute(w: Walker, node: fx.Node, ids: Tensor) -> Any:
    arguments = [
        fx.map_arg(a, lambda n: ids if n is node.args[0] else _plain(w, n)) for a in node.args
    ]
    options = {k: fx.map_arg(v, lambda n: _plain(w, n)) for k, v in node.kwargs.items()}
    target: Any = _VIEWS.get(node.target, node.target)
    return target(*arguments, **options)


_VIEWS: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}


def _plain(w: Walker, node: fx.Node) -> Any:
    if isinstance(node.meta.get("val"), Tensor):
        return constant_value(w, node)
    return w.size(node)


def constant_value(w: Walker, node: Any) -> Tensor | None:
    """The value of an integer tensor that depends on no input and no parameter, or None."""
    if node.op == "get_attr":
        tensor = w.program.tensors[str(node.target)]
        return None if tensor.is_floating_point() else tensor
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.meta["val"].is_floating_point() or not all(w.dims_static(node)):
        return None
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    values = {n: constant_value(w, n) for n in inputs}
    if any(v is None for v in values.values()):
        return None
    arguments, options = fx.map_arg(
        (node.args, dict(node.kwargs)), lambda n: values[n] if n in values else w.size(n)
    )
    target: Any = node.target
    result = target(*arguments, **options)
    return result if isinstance(result, Tensor) else None


def getitem(w: Walker, node: fx.Node) -> Any:
    """Picks a result of an operation that returns several."""
    label = w.labels[node.args[0]]  # type: ignore[index]
    index = int(node.args[1])  # type: ignore[arg-type]
    return label[index] if index < len(label) else ()


def cat(w: Walker, node: fx.Node) -> Label:
    """Axes along the dimension are joined; others must agree and are one."""
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    parts = [p for p in parts if 0 not in w.shape(p)]
    rank = len(w.shape(node))
    dim = int(argument(node, "dim")) % rank
    roles = {a.role for p in parts for a in w.label(p)}
    result: list[Axis] = []
    for role in sorted(roles, key=lambda r: (r is not None, r or 0)):
        across = [_across(w, p, dim, role) for p in parts]
        if any(a is not None for a in across):
            result.append(Axis(_joined(w, parts, across, dim), role))
        beside = [[a for a in w.label(p) if a.role == role and dim not in a.dims] for p in parts]
        result.extend(_agreed(w, node, beside))
    return tuple(result)


def _across(w: Walker, part: Any, dim: int, role: int | None) -> Tensor | None:
    axes = [a for a in w.label(part) if a.role == role and dim in a.dims]
    for extra in axes[1:]:
        w.ledger.freeze(extra.ids, "several neurons per position are joined")
    return axes[0].ids if axes else None


def _joined(w: Walker, parts: list[Any], across: list[Tensor | None], dim: int) -> Tensor:
    """Arrays side by side along ``dim``; a part without neurons, or of one position, keeps none."""
    rank = len(w.shape(parts[0]))
    full = []
    for part, ids in zip(parts, across, strict=True):
        size = w.shape(part)[dim]
        if ids is None:
            single = [a for a in w.label(part) if a.ids.numel() == 1]
            fill = single[0].ids if size == 1 and single else torch.full((1,) * rank, -1)
            ids = fill.reshape((1,) * rank)
        full.append(ids.expand([size if d == dim else s for d, s in enumerate(ids.shape)]))
    common = [max(f.shape[d] for f in full) for d in range(rank)]
    return torch.cat(
        [f.expand([f.shape[d] if d == dim else common[d] for d in range(rank)]) for f in full], dim
    )


def _agreed(w: Walker, node: fx.Node, beside: list[list[Axis]]) -> list[Axis]:
    """Axes that run beside the joined dimension are one; a part without them freezes them."""
    present = [b for b in beside if b]
    if not present:
        return []
    first = present[0]
    if len(present) < len(beside) or any(len(b) != len(first) for b in present):
        for axes in present:
            for axis in axes:
                w.ledger.freeze(axis.ids, "joined with a value without these neurons")
        return first
    for axes in present[1:]:
        for a, b in zip(first, axes, strict=True):
            w.ledger.unify(a.ids, b.ids)
    return first


def stack(w: Walker, node: fx.Node) -> Label:
    """A rectangle of several parts: position by position they are one."""
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    rank = len(w.shape(node))
    dim = int(argument(node, "dim")) % rank
    beside = [list(w.label(p)) for p in parts]
    return tuple(a.at(a.ids.unsqueeze(dim)) for a in _agreed(w, node, beside))


def enlarge(w: Walker, node: fx.Node) -> Label:
    """Expand and repeat: repetition of one position along a fixed dimension makes new neurons.

    They are new because whatever the repeated value meets decides which of them stay.
    """
    axes = list(move(w, node))
    source = w.shape(node.args[0])  # type: ignore[arg-type]
    result, fixed = w.shape(node), w.dims_static(node)
    lead = len(result) - len(source)
    for d, size in enumerate(result):
        was = source[d - lead] if d >= lead else 1
        if size > 1 and was == 1 and fixed[d] and not any(d in a.dims for a in axes):
            shape = [size if i == d else 1 for i in range(len(result))]
            axes.append(Axis(w.ledger.fresh(*shape)))
    return tuple(axes)


def pad(w: Walker, node: fx.Node) -> Label:
    """Padding along a dimension with neurons adds positions that must stay."""
    source, amounts = node.args[0], node.args[1]
    rank = len(w.shape(node))
    padded = {
        rank - 1 - i // 2
        for i, a in enumerate(amounts)  # type: ignore[arg-type]
        if not (isinstance(a, int) and a == 0)
    }
    axes = []
    for axis in w.label(source):
        if padded & set(axis.dims):
            w.refuse(node, "padding along a neuron dimension", axis.ids)
        else:
            axes.append(axis)
    return tuple(axes)


def pick(w: Walker, node: fx.Node) -> Label:
    """index_select: executed if the indices are constant; else only along other dimensions."""
    source, dim, index = node.args[0], int(node.args[1]), node.args[2]  # type: ignore[arg-type]
    dim %= len(w.shape(source))  # type: ignore[arg-type]
    if not w.axes_at(source, dim):
        return w.label(source)
    values = constant_value(w, index)
    if values is None:
        w.refuse(node, "neurons picked by indices computed at run time", *_ids(w, source))
        return ()
    moved: Label = move(w, node)
    return moved


def gather(w: Walker, node: fx.Node) -> Label:
    """Gathers along a dimension without neurons; the other dimensions agree with the index."""
    source, dim, index = node.args[0], int(node.args[1]), node.args[2]  # type: ignore[arg-type]
    dim %= len(w.shape(source))  # type: ignore[arg-type]
    if w.axes_at(source, dim):
        w.refuse(node, "neurons picked by indices computed at run time", *_ids(w, source))
        return ()
    ours, theirs = w.label(source), w.label(index)
    for axis in theirs:
        partner = next((a for a in ours if set(a.dims) & set(axis.dims)), None)
        if partner is None:
            w.ledger.freeze(axis.ids, "indexes a dimension without neurons")
        else:
            w.ledger.unify(partner.ids, axis.ids)
    covered = {d for a in theirs for d in a.dims}
    for axis in ours:
        if not set(axis.dims) <= covered:
            w.refuse(node, "gathered with an index that does not follow the neurons", axis.ids)
    return w.settle(ours)


def index(w: Walker, node: fx.Node) -> Label:
    """Advanced indexing: along dimensions without neurons, by one index tensor at the front."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    places = [i for i, n in enumerate(indices) if n is not None]
    shape = w.shape(source)  # type: ignore[arg-type]
    touched = any(w.axes_at(source, i) for i in places)
    if touched or any(indices[i].meta["val"].dtype == torch.bool for i in places):
        w.refuse(node, "neurons picked by indices", *_ids(w, source))
        return ()
    lengths = [len(w.shape(indices[i])) for i in places]
    width = max(lengths, default=0)
    contiguous = places == list(range(places[0], places[-1] + 1)) if places else True
    where = places[0] if contiguous and places else 0
    axes = []
    for axis in w.label(source):
        rest = [s for d, s in enumerate(axis.ids.shape) if d not in places]
        lead = [d for d in range(len(shape)) if d not in places and d < where]
        at = len(lead)
        axes.append(axis.at(axis.ids.reshape(rest[:at] + [1] * width + rest[at:])))
    return tuple(axes)


def _ids(w: Walker, node: Any) -> list[Tensor]:
    return [a.ids for a in w.label(node)]


RULES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "dropout",
            "feature_dropout",
            "alpha_dropout",
            "clone",
            "contiguous",
            "to",
            "_to_copy",
            "type_as",
            "detach",
            "alias",
            "lift_fresh_copy",
            "lift_fresh",
            "zeros_like",
            "ones_like",
            "full_like",
            "empty_like",
            "pad_packed",
            "check_input",
        ),
        same,
    ),
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "transpose",
            "permute",
            "movedim",
            "t",
            "numpy_T",
            "mT",
            "unsqueeze",
            "squeeze",
            "select",
            "narrow",
            "split",
            "split_with_sizes",
            "chunk",
            "unbind",
            "flip",
            "swapaxes",
            "swapdims",
            "repeat_interleave",
        ),
        move,
    ),
    **dict.fromkeys(("expand", "repeat", "tile", "broadcast_to"), enlarge),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(("constant_pad_nd", "pad", "reflection_pad1d", "replication_pad1d"), pad),
    **dict.fromkeys(
        (
            "channel_shuffle",
            "pixel_shuffle",
            "pixel_unshuffle",
            "diagonal",
            "tensor_split",
        ),
        rigid,
    ),
    **dict.fromkeys(("roll", "unfold"), shift),
    "slice": cut,
    "stack": stack,
    "getitem": getitem,
    "index_select": pick,
    "gather": gather,
    "index": index,
}
