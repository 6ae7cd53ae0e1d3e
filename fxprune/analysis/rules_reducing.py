"""Rules for normalizations, reductions and pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from fxprune.analysis.labels import Axis
from fxprune.analysis.rules_pointwise import pointwise
from fxprune.operations import argument, dims_of, operation_name

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES"]


def layer_norm(w: Walker, node: fx.Node) -> Label:
    """Normalizes the last dimensions: gains follow the neurons, the statistics read them."""
    x, normalized = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    rank = len(w.shape(x))  # type: ignore[arg-type]
    first = rank - len(normalized)
    for parameter in node.args[2:4]:
        _follow(w, x, parameter, first)
    for axis in w.label(x):
        if any(d >= first for d in axis.dims):
            if len(normalized) > 1:
                w.refuse(node, "normalization over several dimensions", axis.ids)
            w.read(node, x, axis.ids, "normalization")  # type: ignore[arg-type]
    return w.label(x)


def _follow(w: Walker, x: Any, parameter: Any, first: int) -> None:
    """A gain or bias over the trailing dimensions from ``first`` belongs to the same neurons."""
    rank = len(w.shape(x))
    for axis in w.label(parameter):
        ids = axis.ids.reshape((1,) * (rank - axis.ids.dim()) + tuple(axis.ids.shape))
        partners = [a for a in w.label(x) if any(d >= first for d in a.dims)]
        if not partners:
            w.ledger.freeze(ids, "normalizes a dimension without neurons")
        for partner in partners:
            w.ledger.unify(partner.ids, ids)


def channel_norm(w: Walker, node: fx.Node) -> Label:
    """Batch and instance norm: one gain, bias, mean and variance per channel (dimension 1)."""
    x = node.args[0]
    _per_channel(w, x, node.args[1:5])
    return w.label(x)


def _per_channel(w: Walker, x: Any, parameters: Any) -> None:
    rank = len(w.shape(x))
    for parameter in parameters:
        if not isinstance(parameter, fx.Node):
            continue
        for axis in w.label(parameter):
            ids = axis.ids.reshape([-1 if d == 1 else 1 for d in range(rank)])
            partners = w.axes_at(x, 1)
            if not partners:
                w.ledger.freeze(ids, "normalizes channels without neurons")
            for partner in partners:
                w.ledger.unify(partner.ids, ids)


def group_norm(w: Walker, node: fx.Node) -> Label:
    """Group norm: one position of every group is one neuron; the statistics read all."""
    x, groups = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    _per_channel(w, x, node.args[2:4])
    for axis in w.axes_at(x, 1):
        if axis.dims != (1,):
            w.refuse(node, "group norm over neurons along several dimensions", axis.ids)
            continue
        blocks = axis.ids.reshape(groups, -1)
        w.ledger.unify(blocks, blocks[:1])
        w.read(node, x, axis.ids, "normalization")  # type: ignore[arg-type]
    return w.label(x)


def weight_norm(w: Walker, node: fx.Node) -> Label:
    """Weight norm: without one input, a row's norm and so all of its connections would change."""
    remedy = (
        "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or "
        "torch.nn.utils.remove_weight_norm(layer) if it is of the older kind"
    )
    w.freeze_inputs(node, f"weight norm reads whole rows; fold it before compiling: {remedy}")
    return ()


_BY_POSITION = frozenset({"sum", "mean", "max", "min", "amax", "amin"})


def reduce(w: Walker, node: fx.Node) -> Label:
    """Sum and mean: over a neuron dimension they read the neurons; a cut one adds nothing."""
    return _reduced(w, node, "reduction")


def reorder(w: Walker, node: fx.Node) -> Any:
    """Maximum, norm, variance and the like: over a neuron dimension all neurons must stay."""
    label = _reduced(w, node, "other")
    value = node.meta["val"]
    return [label] * len(value) if isinstance(value, (list, tuple)) else label


def extreme(w: Walker, node: fx.Node) -> Any:
    """Maximum and minimum: where two values meet, or over dimensions."""
    return reorder(w, node) if argument(node, "other") is None else pointwise(w, node)


def _reduced(w: Walker, node: fx.Node, kind: str) -> Label:
    x = node.args[0]
    rank = len(w.shape(x))  # type: ignore[arg-type]
    dims = dims_of(argument(node, "dim"), rank)
    value = node.meta["val"]
    out_rank = (value[0] if isinstance(value, (list, tuple)) else value).dim()
    kept = []
    for axis in w.label(x):
        ids, over = axis.ids, dims & set(axis.dims)
        if over and over < set(axis.dims) and operation_name(node) in _BY_POSITION:
            # Parts of a split dimension, such as directions: position k of all is one neuron.
            for d in sorted(over):
                w.ledger.unify(ids, ids.narrow(d, 0, 1))
                ids = ids.narrow(d, 0, 1)
        elif over:
            w.read(node, x, ids, kind)  # type: ignore[arg-type]
            if kind == "other":
                w.refuse(node, f"{operation_name(node)} over neurons", ids)
            if over < set(axis.dims):
                # Neurons along further dimensions: what remains is read as a whole.
                w.refuse(node, f"{operation_name(node)} over part of a split dimension", ids)
            continue
        if out_rank < rank:
            ids = ids.reshape([s for d, s in enumerate(ids.shape) if d not in dims])
        kept.append(axis.at(ids))
    return w.settle(kept)


def along(w: Walker, node: fx.Node) -> Label:
    """Softmax, cumulative sums, sorts: over a neuron dimension all neurons must stay."""
    x = node.args[0]
    rank = len(w.shape(x))  # type: ignore[arg-type]
    for axis in w.axes_at(x, int(argument(node, "dim")) % rank):
        w.refuse(node, f"{operation_name(node)} over neurons", axis.ids)
        w.read(node, x, axis.ids, "other")  # type: ignore[arg-type]
    value = node.meta["val"]
    return [w.label(x)] * len(value) if isinstance(value, (list, tuple)) else w.label(x)  # type: ignore[return-value]


def topk(w: Walker, node: fx.Node) -> Any:
    """The k largest: along a dimension without neurons the others pass."""
    x = node.args[0]
    rank = len(w.shape(x))  # type: ignore[arg-type]
    dim = int(argument(node, "dim")) % rank
    for axis in w.axes_at(x, dim):
        w.refuse(node, "topk over neurons", axis.ids)
        w.read(node, x, axis.ids, "other")  # type: ignore[arg-type]
    label = tuple(a for a in w.label(x) if dim not in a.dims)
    return [label, label]


def pool(w: Walker, node: fx.Node) -> Any:
    """Pooling over the trailing dimensions; channels pass."""
    x = node.args[0]
    spatial = int(operation_name(node).replace("_with_indices", "")[-2])
    rank = len(w.shape(x))  # type: ignore[arg-type]
    kept: list[Axis] = []
    for axis in w.label(x):
        for d in range(rank - spatial, rank):
            if d in axis.dims:
                w.ledger.unify(axis.ids, axis.ids.narrow(d, 0, 1))
        index = tuple(slice(None) if d < rank - spatial else slice(0, 1) for d in range(rank))
        kept.append(axis.at(axis.ids[index]))
    label = w.settle(kept)
    value = node.meta["val"]
    return [label] * len(value) if isinstance(value, (list, tuple)) else label


RULES: dict[str, Any] = {
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "batch_norm": channel_norm,
    "instance_norm": channel_norm,
    "group_norm": group_norm,
    "_weight_norm": weight_norm,
    **dict.fromkeys(("sum", "mean"), reduce),
    **dict.fromkeys(("max", "min"), extreme),
    **dict.fromkeys(
        (
            "amax",
            "amin",
            "aminmax",
            "argmax",
            "argmin",
            "prod",
            "norm",
            "linalg_vector_norm",
            "var",
            "std",
            "var_mean",
            "logsumexp",
            "all",
            "any",
            "median",
            "mode",
        ),
        reorder,
    ),
    **dict.fromkeys(
        (
            "softmax",
            "log_softmax",
            "_softmax",
            "_log_softmax",
            "cumsum",
            "cumprod",
            "sort",
            "argsort",
            "logcumsumexp",
        ),
        along,
    ),
    "topk": topk,
    **dict.fromkeys(
        tuple(
            f"{kind}_pool{n}d"
            for kind in ("avg", "max", "adaptive_avg", "adaptive_max", "lp")
            for n in (1, 2, 3)
        )
        + tuple(f"upsample_{kind}{n}d" for kind in ("nearest", "linear") for n in (1, 2)),
        pool,
    ),
}
