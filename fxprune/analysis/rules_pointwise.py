"""Rules for operations on each position alone, for factories, and for what nothing is known of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprune.analysis.labels import Axis, collapse, combine
from fxprune.operations import argument

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["RULES", "merge"]


def pointwise(w: Walker, node: fx.Node) -> Label:
    """Operands meet position by position, with broadcasting: what meets is one neuron."""
    operands = [n for n in _tensor_inputs(node) if w.shape(n)]
    return merge(w, node, operands, w.shape(node))


def _tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def merge(w: Walker, node: fx.Node, operands: list[fx.Node], shape: tuple[int, ...]) -> Label:
    """Labels of a value whose positions come from the same positions of each operand.

    Axes of different operands that share a dimension are unified. Where one operand has neurons
    and another has several positions without, the neurons must stay.
    """
    rank = len(shape)
    aligned = [(n, [_align(a, rank) for a in w.label(n)]) for n in operands]
    result = combine(w.ledger, (), [axis for _, axes in aligned for axis in axes])
    for n, axes in aligned:
        sizes = (1,) * (rank - len(w.shape(n))) + w.shape(n)
        for axis in result:
            bare = [d for d in axis.dims if sizes[d] > 1 and not any(d in a.dims for a in axes)]
            # Positions along several dimensions may share one neuron; then none is bare.
            if bare and not any(axis.overlaps(a) for a in axes):
                w.ledger.freeze(axis.ids, f"meets values without neurons in {node.target}")
    return tuple(result)


def _align(axis: Axis, rank: int) -> Axis:
    lead = rank - axis.ids.dim()
    return axis.at(axis.ids.reshape((1,) * lead + tuple(axis.ids.shape)))


def factory(w: Walker, node: fx.Node) -> Label:
    """A new tensor of given sizes: whatever it meets decides which of its positions stay."""
    return w.fresh_joint(node)


def noise(w: Walker, node: fx.Node) -> Label:
    """Random numbers: fewer of them would be other ones, so whatever neurons they meet stay."""
    reason = "random numbers would be others for fewer neurons"
    w.freeze_inputs(node, reason)
    drawn = w.fresh_joint(node)
    for axis in drawn:
        w.ledger.freeze(axis.ids, reason)
    return drawn


def plain(w: Walker, node: fx.Node) -> Label:
    """A value whose positions carry no neurons: indices, sizes, comparisons of positions."""
    return ()


def triangle(w: Walker, node: fx.Node) -> Label:
    """One side of the diagonal: places decide, so whatever neurons there are must stay."""
    for axis in w.label(node.args[0]):
        w.ledger.freeze(axis.ids, "cut along a diagonal")
    return ()


def glu(w: Walker, node: fx.Node) -> Label:
    """The first half of a dimension gates the second: position k of both is one neuron."""
    source = node.args[0]
    rank = len(w.shape(node))
    dim = int(argument(node, "dim")) % rank
    axes = []
    for axis in w.label(source):
        if dim in axis.dims:
            first, second = axis.ids.chunk(2, dim)
            w.ledger.unify(first, second)
            axis = axis.at(collapse(first))
        axes.append(axis)
    return w.settle(axes)


def prelu(w: Walker, node: fx.Node) -> Label:
    """One slope for all, or one for each channel (dimension 1)."""
    source, slope = node.args[0], node.args[1]
    rank = len(w.shape(node))
    if max(w.shape(slope), default=1) > 1 and not w.label(slope):  # type: ignore[arg-type]
        for axis in w.axes_at(source, 1):
            w.ledger.freeze(axis.ids, "slopes that are computed")
    for axis in w.label(slope):
        shape = [1] * rank
        if rank > 1:
            shape[1] = axis.ids.numel()
        ids = axis.ids.reshape(shape)
        partners = w.axes_at(source, 1)
        if not partners:
            w.ledger.freeze(ids, "slopes of channels that carry no neurons")
        for partner in partners:
            w.ledger.unify(partner.ids, ids)
    return w.label(source)


def unknown(w: Walker, node: fx.Node) -> Any:
    """An operation without a rule: whatever it touches stays as it is."""
    w.freeze_inputs(node, f"{node.target} has no rule")
    value = node.meta.get("val")
    return [()] * len(value) if isinstance(value, (list, tuple)) else ()


RULES: dict[str, Any] = {
    "pointwise": pointwise,
    "unknown": unknown,
    **dict.fromkeys(
        (
            "masked_fill",
            "where",
            "softplus",
            "clamp",
            "add",
            "sub",
            "mul",
            "div",
            "rsub",
            "relu6",
            "selu",
            "celu",
            "mish",
            "silu",
            "hardtanh",
            "hardswish",
            "hardsigmoid",
            "log_sigmoid",
            "logsigmoid",
            "softsign",
            "threshold",
            "rrelu",
            "lerp",
            "addcmul",
            "square",
            "__and__",
            "__or__",
            "__xor__",
        ),
        pointwise,
    ),
    **dict.fromkeys(
        (
            "zeros",
            "ones",
            "full",
            "empty",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
            "empty_permuted",
        ),
        factory,
    ),
    **dict.fromkeys(
        (
            "rand",
            "randn",
            "randint",
            "rand_like",
            "randn_like",
            "randint_like",
            "bernoulli",
            "normal",
            "normal_functional",
            "uniform",
            "exponential",
        ),
        noise,
    ),
    **dict.fromkeys(
        (
            "arange",
            "eye",
            "scalar_tensor",
            "linspace",
            "one_hot",
            "sym_size",
            "item",
        ),
        plain,
    ),
    **dict.fromkeys(("tril", "triu"), triangle),
    "glu": glu,
    "prelu": prelu,
    "_prelu_kernel": prelu,
}
