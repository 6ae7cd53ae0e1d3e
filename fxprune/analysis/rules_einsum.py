"""Rules for einsum: two operands without repeated letters, as a permuted matrix product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprune.analysis.contracting import NOBODY, connect, is_weight, join_parts
from fxprune.analysis.labels import Axis, collapse, combine

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES"]


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
    weight = next((i for i in (1, 0) if is_weight(w, operands[i])), None)
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
    return tuple(combine(w.ledger, (), axes))


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
        join_parts(w, left)
        join_parts(w, right)
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
        destinations = NOBODY.reshape((1,) * len(term))
    connect(w, node, operand, along(inner), destinations)


RULES: dict[str, Any] = {"einsum": einsum}
