"""Rules for operations that contract: matrix products, embeddings, attention.

The neurons along a contracted dimension are read; those of the weight's other dimension are
produced. Where two computed values contract (attention), position k of both is one neuron; where
the parts of a split dimension meet (heads), a whole part is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx

from fxprune.analysis.contracting import connect, is_weight, join_parts, meet, weight_axis
from fxprune.analysis.labels import Axis, combine
from fxprune.operations import argument

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES"]


def linear(w: Walker, node: fx.Node) -> Label:
    """``x [..., in]`` with ``weight [out, in]`` and ``bias [out]``."""
    x, _, bias = (*node.args, None)[:3]
    return _product(w, node, x, 1, 1, bias)


def _product(
    w: Walker, node: fx.Node, x: Any, position: int, inner: int, bias: Any = None
) -> Label:
    """Contracts the last dimension of ``x`` with dimension ``inner`` of a weight matrix."""
    rank, weight, outer = len(w.shape(x)), node.args[position], 1 - inner
    rows, columns = weight_axis(w, weight, outer), weight_axis(w, weight, inner)
    meet(w, x, rank - 1, columns)
    connect(w, node, (position,), columns.unsqueeze(outer), rows.unsqueeze(inner))
    if isinstance(bias, fx.Node):
        for axis in w.axes_at(bias, len(w.shape(bias)) - 1):
            w.ledger.unify(axis.ids.reshape(-1), rows.reshape(-1))
    out_rank = len(w.shape(node))
    carried = [a for a in w.label(x) if rank - 1 not in a.dims and a.ids.numel() > 1]
    result = [Axis(rows.reshape((1,) * (out_rank - 1) + (-1,)))]
    return (*[a.at(a.ids.reshape((*a.ids.shape[: out_rank - 1], 1))) for a in carried], *result)


def matmul(w: Walker, node: fx.Node) -> Label:
    """``matmul``, ``mm``, ``bmm``, ``mv``: a weight on either side, or two computed values."""
    a, b = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    if is_weight(w, b) and len(w.shape(b)) == 2:
        return _product(w, node, a, 1, 0)
    if is_weight(w, b) and len(w.shape(b)) == 1:
        return _scores(w, node, a, b)
    if is_weight(w, a) and len(w.shape(a)) == 2 and len(w.shape(b)) <= 2:
        return _left_product(w, node, a, b)
    return _values(w, node, a, b)


def addmm(w: Walker, node: fx.Node) -> Label:
    """``bias + a @ b``."""
    bias, a, b = node.args[0], node.args[1], node.args[2]
    if is_weight(w, b):
        return _product(w, node, a, 2, 0, bias)
    w.freeze_inputs(node, "addmm of two computed values")
    return ()


def _scores(w: Walker, node: fx.Node, x: Any, vector: Any) -> Label:
    """``x [..., in] @ vector [in]``: one number for each position, as additive attention has it."""
    last = len(w.shape(x)) - 1
    columns, single = weight_axis(w, vector, 0), w.ledger.fresh(1)
    w.ledger.freeze(single, "the only one of its dimension")
    meet(w, x, last, columns)
    connect(w, node, (1,), columns, single)
    carried = [a for a in w.label(x) if last not in a.dims and a.ids.numel() > 1]
    return tuple(a.at(a.ids.squeeze(last)) for a in carried)


def _left_product(w: Walker, node: fx.Node, weight: Any, x: Any) -> Label:
    """``weight [out, in] @ x [in, ...]``."""
    rows, columns = weight_axis(w, weight, 0), weight_axis(w, weight, 1)
    meet(w, x, 0, columns)
    connect(w, node, (0,), columns.reshape(1, -1), rows.reshape(-1, 1))
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
    return tuple(combine(w.ledger, left, right))


def _contract(w: Walker, node: fx.Node, a: Any, i: int, b: Any, j: int) -> None:
    ours, theirs = w.axes_at(a, i), w.axes_at(b, j)
    if len(ours) == 1 and len(theirs) == 1:
        left, right = ours[0].ids.movedim(i, -1), theirs[0].ids.movedim(j, -1)
        join_parts(w, left)
        join_parts(w, right)
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


def attention(w: Walker, node: fx.Node) -> Label:
    """Scaled dot-product attention: ``query`` and ``key`` contract, ``value`` passes."""
    query, key, value = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args[:3])
    rank = len(w.shape(query))
    heads_of = [w.shape(x)[-3:-2] for x in (query, key, value)]
    if any(heads not in ((1,), heads_of[0]) for heads in heads_of):
        w.freeze_inputs(node, "attention with fewer heads of keys than of queries has no rule")
        return ()
    _contract(w, node, query, rank - 1, key, rank - 1)
    heads = [Axis(a.ids.narrow(rank - 1, 0, 1)) for a in w.label(query)]
    heads = [a for a in heads if a.ids.numel() > 1]
    result = tuple(combine(w.ledger, heads, w.label(value)))
    mask = argument(node, "attn_mask")
    for axis in w.label(mask):
        w.ledger.freeze(axis.ids, "attention mask")
    return tuple(a for a in result if rank - 1 in a.dims) or result


def embedding(w: Walker, node: fx.Node) -> Label:
    """Rows are looked up and stay; columns are produced."""
    table = node.args[0]
    rows = [a for a in w.label(table) if a.role == 0 or 0 in a.dims]
    for axis in rows:
        w.ledger.freeze(axis.ids, "rows of an embedding")
    columns = weight_axis(w, table, 1)
    connect(w, node, (0,), None, columns.reshape(1, -1))
    rank = len(w.shape(node))
    return (Axis(columns.reshape((1,) * (rank - 1) + (-1,))),)


RULES: dict[str, Any] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), matmul),
    "addmm": addmm,
    "embedding": embedding,
    "scaled_dot_product_attention": attention,
}
