"""Rules for einsum without repeated letters, as a permuted product, and for bilinear maps.

At most one operand is a weight where there are more than two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_letters
from typing import TYPE_CHECKING, Any, cast

from torch import fx

from fxprune.analysis.contracting import NOBODY, connect, is_weight, join_parts, meet, weight_axis
from fxprune.analysis.labels import Axis, collapse, combine

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES"]


@dataclass(frozen=True)
class _Product:
    """An einsum: the letters of each operand's dimensions and those of the result.

    Attributes:
        node: the operation.
        operands: values and at most one that counts as the weight.
        terms: a letter for each dimension of each operand.
        result: letters of the result.
        weight: position of the weight among the operands; None if all are values.
    """

    node: fx.Node
    operands: tuple[Any, ...]
    terms: tuple[str, ...]
    result: str
    weight: int | None

    def holders(self, letter: str) -> list[int]:
        """Operands with a letter."""
        return [i for i, term in enumerate(self.terms) if letter in term]


def einsum(w: Walker, node: fx.Node) -> Label:
    """Operands without repeated letters, as a permuted product; else frozen."""
    equation, operands = str(node.args[0]).replace(" ", ""), tuple(node.args[1])  # type: ignore[arg-type]
    equation = _spelled(equation, [len(w.shape(x)) for x in operands])
    if "->" not in equation:
        w.freeze_inputs(node, f"einsum {equation!r} has no rule")
        return ()
    left, result = equation.split("->")
    terms = tuple(left.split(","))
    if any(len(set(t)) != len(t) for t in (*terms, result)):
        w.freeze_inputs(node, f"einsum {equation!r} repeats a letter")
        return ()
    weights = [i for i, operand in enumerate(operands) if is_weight(w, operand)]
    if len(operands) != 2 and (len(operands) == 1 or len(weights) > 1):
        w.freeze_inputs(node, f"einsum {equation!r} has no rule")
        return ()
    product = _Product(node, operands, terms, result, weights[-1] if weights else None)
    for letter in dict.fromkeys("".join(terms)):
        holders = product.holders(letter)
        if len(holders) == 1 and letter not in result:
            _sum(w, product, letter, holders[0])
        for pair in pairwise(holders):
            _meet(w, product, letter, pair)
    if product.weight is not None:
        _use(w, product, product.weight)
    return _result(w, product)


def _spelled(equation: str, ranks: list[int]) -> str:
    """An equation with letters for its dots, which stand for as many dimensions as are left."""
    terms, arrow, result = equation.partition("->")
    each = list(zip(terms.split(","), ranks, strict=True))
    left = [rank - len(term.replace("...", "")) for term, rank in each]
    free = "".join(sorted(set(ascii_letters) - set(equation))[: max(left)])
    named = [t.replace("...", free[len(free) - n :]) for (t, _), n in zip(each, left, strict=True)]
    return ",".join(named) + arrow + result.replace("...", free)


def _sum(w: Walker, product: _Product, letter: str, position: int) -> None:
    """A letter of one operand alone that the result lacks."""
    operand = product.operands[position]
    for axis in w.axes_at(operand, product.terms[position].index(letter)):
        w.ledger.freeze(axis.ids, "summed over by einsum")
        w.read(product.node, operand, axis.ids, "other")


def _meet(w: Walker, product: _Product, letter: str, pair: tuple[int, int]) -> None:
    """The neurons of two operands along a letter they share are the same."""
    operands = [product.operands[i] for i in pair]
    dims = [product.terms[i].index(letter) for i in pair]
    ours, theirs = (w.axes_at(x, dim) for x, dim in zip(operands, dims, strict=True))
    if len(ours) != 1 or len(theirs) != 1:
        for axis in (*ours, *theirs):
            w.ledger.freeze(axis.ids, "meets a dimension without neurons in einsum")
            w.read(product.node, operands[0 if axis in ours else 1], axis.ids, "other")
        return
    left, right = ours[0].ids.movedim(dims[0], -1), theirs[0].ids.movedim(dims[1], -1)
    if letter not in product.result and product.weight not in pair:
        join_parts(w, left)
        join_parts(w, right)
        if left.numel() == left.shape[-1]:
            w.read(product.node, operands[0], ours[0].ids, "reduction")
    a, b = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if a.shape[0] > 1 and b.shape[0] > 1 and a.shape[0] != b.shape[0]:
        a = a[:1]
    w.ledger.unify(a, b)


def _use(w: Walker, product: _Product, position: int) -> None:
    """The weight's connections lead from the first dimension summed over to the one kept.

    What meets a further dimension that is summed over (the second factor of a bilinear map) is
    read by all of them.
    """
    operand, term = product.operands[position], product.terms[position]
    summed = [x for x in term if x not in product.result and len(product.holders(x)) > 1]
    sources = [a for x in summed for a in w.label(operand) if term.index(x) in a.dims]
    for letter in summed[1:]:
        for other in product.holders(letter):
            dim = product.terms[other].index(letter)
            for axis in w.axes_at(product.operands[other], dim) if other != position else ():
                w.read(product.node, product.operands[other], axis.ids, "reduction")
    kept = [d for d, x in enumerate(term) if x in product.result]
    rows = [a for a in w.label(operand) if set(kept) & set(a.dims)]
    destinations = rows[0].ids if len(rows) == 1 else NOBODY.reshape((1,) * len(term))
    if len(rows) > 1:
        for axis in rows:
            w.ledger.freeze(axis.ids, "weight of an einsum whose rows cannot be told apart")
    elif not rows:
        destinations = w.ledger.fresh(*[1] * len(term))
        w.ledger.freeze(destinations, "the only one of its dimension")
    connect(w, product.node, (1, position), sources[0].ids if sources else None, destinations)


def _result(w: Walker, product: _Product) -> Label:
    """The neurons of the operands along the letters that the result has."""
    result, axes = product.result, list[Axis]()
    for operand, term in zip(product.operands, product.terms, strict=True):
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
    return tuple(combine(w.ledger, (), axes))


def bilinear(w: Walker, node: fx.Node) -> Label:
    """``a [..., first]``, ``b [..., second]``, ``weight [out, first, second]`` and a bias [out]."""
    a, b, weight, bias = cast("tuple[fx.Node, ...]", (*node.args, None)[:4])
    rows, first, second = (weight_axis(w, weight, d) for d in range(3))
    last = len(w.shape(a)) - 1
    meet(w, a, last, first)
    meet(w, b, last, second)
    w.read(node, b, second, "reduction")
    connect(w, node, (2,), first.reshape(1, -1, 1), rows.reshape(-1, 1, 1))
    if isinstance(bias, fx.Node):
        for axis in w.axes_at(bias, 0):
            w.ledger.unify(axis.ids.reshape(-1), rows)
    carried = [
        axis.at(axis.ids.narrow(last, 0, 1))
        for x in (a, b)
        for axis in w.label(x)
        if last not in axis.dims and axis.ids.numel() > 1
    ]
    result = Axis(rows.reshape((1,) * last + (-1,)))
    return tuple(combine(w.ledger, (), [*carried, result]))


RULES: dict[str, Any] = {"einsum": einsum, "bilinear": bilinear}
