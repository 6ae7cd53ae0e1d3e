"""Rules for operations that contract: linear maps, convolutions, embeddings, attention.

The neurons along a contracted dimension are read; those of the weight's other dimension are
produced. Where two computed values contract (attention), position k of both is one neuron; where
the parts of a split dimension meet (heads), a whole part is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx

from fxprune.analysis.labels import Axis, collapse
from fxprune.analysis.walker import Use, operation_name

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES", "connect"]

_NOBODY = torch.tensor(-1)


def connect(
    w: Walker, node: fx.Node, operand: Any, sources: Tensor | None, destinations: Tensor
) -> None:
    """Notes the use of a weight; ``sources`` and ``destinations`` broadcast to the operand."""
    roots = w.roots(operand)
    if not roots:  # computed from other tensors: its rows and columns stay, so nothing to note
        return
    rank = destinations.dim()
    none = _NOBODY.reshape((1,) * rank)
    w.uses.append(
        Use(str(roots[0].target), operand, node, none if sources is None else sources, destinations)
    )


def linear(w: Walker, node: fx.Node) -> Label:
    """``x [..., in]`` with ``weight [out, in]`` and ``bias [out]``."""
    x, weight, bias = (*node.args, None)[:3]
    return _product(w, node, x, weight, 1, 0, bias)


def _product(
    w: Walker, node: fx.Node, x: Any, weight: Any, inner: int, outer: int, bias: Any = None
) -> Label:
    """Contracts the last dimension of ``x`` with dimension ``inner`` of a weight matrix."""
    rank = len(w.shape(x))
    rows, columns = _weight_axis(w, weight, outer), _weight_axis(w, weight, inner)
    _meet(w, x, rank - 1, columns)
    connect(w, node, weight, columns.unsqueeze(outer), rows.unsqueeze(inner))
    if isinstance(bias, fx.Node):
        for axis in w.axes_at(bias, len(w.shape(bias)) - 1):
            w.ledger.unify(axis.ids.reshape(-1), rows.reshape(-1))
    out_rank = len(w.shape(node))
    carried = [a for a in w.label(x) if rank - 1 not in a.dims and a.ids.numel() > 1]
    result = [Axis(rows.reshape((1,) * (out_rank - 1) + (-1,)))]
    return (*[a.at(a.ids.reshape((*a.ids.shape[: out_rank - 1], 1))) for a in carried], *result)


def _weight_axis(w: Walker, weight: Any, dim: int) -> Tensor:
    """Neurons along one dimension of a weight, one per position; frozen if it has none."""
    size = w.shape(weight)[dim]
    axes = [a for a in w.label(weight) if dim in a.dims]
    if size == 1:
        axes = [a for a in w.label(weight) if a.role == dim and a.ids.numel() == 1]
    if len(axes) == 1 and axes[0].ids.numel() == size:
        return axes[0].ids.reshape(-1)
    for axis in axes:
        w.ledger.freeze(axis.ids, "weight whose rows and columns cannot be told apart")
    ids = w.ledger.fresh(size)
    w.ledger.freeze(ids, "weight whose rows and columns cannot be told apart")
    return ids


def _meet(w: Walker, x: Any, dim: int, columns: Tensor) -> None:
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


def matmul(w: Walker, node: fx.Node) -> Label:
    """``matmul``, ``mm``, ``bmm``, ``mv``: a weight on either side, or two computed values."""
    a, b = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    if _is_weight(w, b) and len(w.shape(b)) == 2:
        return _product(w, node, a, b, 0, 1)
    if _is_weight(w, a) and len(w.shape(a)) == 2 and len(w.shape(b)) <= 2:
        return _left_product(w, node, a, b)
    return _values(w, node, a, b)


def addmm(w: Walker, node: fx.Node) -> Label:
    """``bias + a @ b``."""
    bias, a, b = node.args[0], node.args[1], node.args[2]
    if _is_weight(w, b):
        return _product(w, node, a, b, 0, 1, bias)
    w.freeze_inputs(node, "addmm of two computed values")
    return ()


def _is_weight(w: Walker, node: Any) -> bool:
    return any(a.role is not None for a in w.label(node))


def _left_product(w: Walker, node: fx.Node, weight: Any, x: Any) -> Label:
    """``weight [out, in] @ x [in, ...]``."""
    rows, columns = _weight_axis(w, weight, 0), _weight_axis(w, weight, 1)
    _meet(w, x, 0, columns)
    connect(w, node, weight, columns.reshape(1, -1), rows.reshape(-1, 1))
    rank = len(w.shape(node))
    carried = [a for a in w.label(x) if 0 not in a.dims and a.ids.numel() > 1]
    return (Axis(rows.reshape((-1,) + (1,) * (rank - 1))), *carried)


def _values(w: Walker, node: fx.Node, a: Any, b: Any) -> Label:
    """Two computed values: contracted neurons are one and are read; others pass."""
    if len(w.shape(a)) < 2 or len(w.shape(b)) < 2:
        w.freeze_inputs(node, "product with a computed vector")
        return ()
    _contract(w, node, a, len(w.shape(a)) - 1, b, len(w.shape(b)) - 2)
    rank = len(w.shape(node))
    left = _without(w, a, len(w.shape(a)) - 1, rank)
    right = _without(w, b, len(w.shape(b)) - 2, rank)
    return _combine(w, left, right)


def _contract(w: Walker, node: fx.Node, a: Any, i: int, b: Any, j: int) -> None:
    ours, theirs = w.axes_at(a, i), w.axes_at(b, j)
    if len(ours) == 1 and len(theirs) == 1:
        left, right = ours[0].ids.movedim(i, -1), theirs[0].ids.movedim(j, -1)
        _join_parts(w, left)
        _join_parts(w, right)
        if left.numel() == left.shape[-1] and right.numel() == right.shape[-1]:
            w.ledger.unify(left.reshape(-1), right.reshape(-1))
            w.read(node, a, ours[0].ids, "reduction")
        else:
            # One dimension of each is left out (rows of one, columns of the other).
            w.ledger.unify(*_batched(left, right))
        return
    for axis in (*ours, *theirs):
        w.ledger.freeze(axis.ids, "contracted with a value without neurons")
        w.read(node, a if axis in ours else b, axis.ids, "other")


def _join_parts(w: Walker, ids: Tensor) -> None:
    """Heads: where the contracted dimension is one part of a split one, each part is one neuron."""
    if ids.numel() > ids.shape[-1]:
        w.ledger.unify(ids, ids[..., :1])


def _batched(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Aligns [batch..., rows, k] with [batch..., columns, k] over batch and k."""
    left, right = left.select(-2, 0), right.select(-2, 0)
    rank = max(left.dim(), right.dim())
    return _widened(left, rank), _widened(right, rank)


def _widened(ids: Tensor, rank: int) -> Tensor:
    return ids.reshape((1,) * (rank - ids.dim()) + tuple(ids.shape))


def _without(w: Walker, x: Any, dim: int, rank: int) -> list[Axis]:
    """The axes of one factor over the product: the contracted dimension holds nothing of it."""
    found = []
    for axis in w.label(x):
        ids = _widened(axis.ids.narrow(dim, 0, 1), rank)
        if ids.numel() > 1:
            found.append(Axis(ids))
    return found


def _combine(w: Walker, left: list[Axis], right: list[Axis]) -> Label:
    result = list(left)
    for axis in right:
        partner = next((a for a in result if set(a.dims) & set(axis.dims)), None)
        if partner is None:
            result.append(axis)
            continue
        w.ledger.unify(partner.ids, axis.ids)
        if len(axis.dims) > len(partner.dims):
            result[result.index(partner)] = axis
    return tuple(result)


def attention(w: Walker, node: fx.Node) -> Label:
    """Scaled dot-product attention: ``query`` and ``key`` contract, ``value`` passes."""
    query, key, value = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args[:3])
    rank = len(w.shape(query))
    _contract(w, node, query, rank - 1, key, rank - 1)
    heads = [Axis(a.ids.narrow(rank - 1, 0, 1)) for a in w.label(query)]
    heads = [a for a in heads if a.ids.numel() > 1]
    result = _combine(w, heads, list(w.label(value)))
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    for axis in w.label(mask):
        w.ledger.freeze(axis.ids, "attention mask")
    return tuple(a for a in result if rank - 1 in a.dims) or result


def embedding(w: Walker, node: fx.Node) -> Label:
    """Rows are looked up and stay; columns are produced."""
    table = node.args[0]
    rows = [a for a in w.label(table) if a.role == 0 or 0 in a.dims]
    for axis in rows:
        w.ledger.freeze(axis.ids, "rows of an embedding")
    columns = _weight_axis(w, table, 1)
    connect(w, node, table, None, columns.reshape(1, -1))
    rank = len(w.shape(node))
    return (Axis(columns.reshape((1,) * (rank - 1) + (-1,))),)


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
    rows, columns = _weight_axis(w, weight, outer), _weight_axis(w, weight, inner)
    rank = len(w.shape(weight))
    _meet_channels(w, x, channel, columns)
    connect(
        w,
        node,
        weight,
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
        _meet(w, x, channel, columns)


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
            w.ledger.unify(_weight_axis(w, weight, dim), ids)
        else:
            for axis in w.label(weight):
                if axis.role == dim and size[dim] == 1 and ids.numel() == 1 and per_in > 1:
                    w.ledger.unify(axis.ids.reshape(-1), ids)
    connect(w, node, weight, far, near)
    return rows


def einsum(w: Walker, node: fx.Node) -> Label:
    """Two operands without repeated letters, as a permuted matrix product; else frozen."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if "." in equation or "->" not in equation or len(operands) != 2:
        w.freeze_inputs(node, f"einsum {equation!r} has no rule")
        return ()
    terms, result = equation.split("->")
    a, b = terms.split(",")
    if any(len(set(t)) != len(t) for t in (a, b, result)):
        w.freeze_inputs(node, f"einsum {equation!r} repeats a letter")
        return ()
    return _einsum_labels(w, node, operands, (a, b), result)


def _einsum_labels(
    w: Walker, node: fx.Node, operands: list[Any], terms: tuple[str, str], result: str
) -> Label:
    a, b = terms
    weight = next((i for i in (1, 0) if _is_weight(w, operands[i])), None)
    for letter in a + b:
        if letter in a and letter in b:
            _einsum_meet(w, node, operands, terms, letter, result, weight)
        elif letter not in result:
            for axis in w.axes_at(
                operands[0 if letter in a else 1], terms[letter in b].index(letter)
            ):
                w.ledger.freeze(axis.ids, "summed over by einsum")
                w.read(node, operands[0 if letter in a else 1], axis.ids, "other")
    if weight is not None:
        _einsum_use(w, node, operands[weight], terms[weight], terms[1 - weight], result)
    axes: list[Axis] = []
    for operand, term in zip(operands, terms, strict=True):
        for axis in w.label(operand):
            ids = axis.ids
            kept = [d for d, letter in enumerate(term) if letter in result]
            index = tuple(slice(None) if d in kept else slice(0, 1) for d in range(ids.dim()))
            small = ids[index].permute(
                *[d for _, d in sorted((result.index(term[d]), d) for d in kept)],
                *[d for d in range(ids.dim()) if d not in kept],
            )
            sizes = {letter: ids.shape[term.index(letter)] for letter in term}
            shape = [sizes.get(letter, 1) for letter in result]
            if small.numel() > 1:
                axes.append(Axis(collapse(small.reshape(shape))))
    return _combine(w, axes[:1], axes[1:]) if axes else ()


def _einsum_meet(
    w: Walker,
    node: fx.Node,
    operands: list[Any],
    terms: tuple[str, str],
    letter: str,
    result: str,
    weight: int | None,
) -> None:
    i, j = (t.index(letter) for t in terms)
    ours, theirs = w.axes_at(operands[0], i), w.axes_at(operands[1], j)
    if len(ours) != 1 or len(theirs) != 1:
        for axis in (*ours, *theirs):
            w.ledger.freeze(axis.ids, "meets a dimension without neurons in einsum")
            w.read(node, operands[0 if axis in ours else 1], axis.ids, "other")
        return
    left, right = ours[0].ids.movedim(i, -1), theirs[0].ids.movedim(j, -1)
    if letter not in result and weight is None:
        _join_parts(w, left)
        _join_parts(w, right)
        if left.numel() == left.shape[-1]:
            w.read(node, operands[0], ours[0].ids, "reduction")
    a, b = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if a.shape[0] > 1 and b.shape[0] > 1 and a.shape[0] != b.shape[0]:
        a = a[:1]
    w.ledger.unify(a, b)


def _einsum_use(w: Walker, node: fx.Node, operand: Any, term: str, other: str, result: str) -> None:
    def along(letters: list[str]) -> Tensor | None:
        axes = [a for a in w.label(operand) if any(term.index(x) in a.dims for x in letters)]
        return axes[0].ids if len(axes) == 1 else None

    inner = [x for x in term if x in other and x not in result]
    outer = [x for x in term if x in result]
    destinations = along(outer)
    if destinations is None:
        for axis in w.label(operand):
            w.ledger.freeze(axis.ids, "weight of an einsum whose rows cannot be told apart")
        destinations = _NOBODY.reshape((1,) * len(term))
    connect(w, node, operand, along(inner), destinations)


RULES: dict[str, Any] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), matmul),
    "addmm": addmm,
    "embedding": embedding,
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(
        (
            "conv1d",
            "conv2d",
            "conv3d",
            "convolution",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
        ),
        convolution,
    ),
}
