"""Residual branches: what is added to a shortcut, and which tensors make it add nothing.

A branch begins and ends at an addition ``x + f(x)``: ``x`` is the shortcut, and ``f`` goes through
weights that nothing outside of it uses; nothing else reads what it adds. With its *outputs* at 0
(the weights of its last product, their biases, the gain and offset of a batch norm behind it) the
branch adds exactly 0, ``x`` is all that goes on, and whatever in the branch fed only those weights
is read by nothing any more.

A branch can end in a linear map, a convolution or a recurrent layer that starts from zeros, and
behind that in activations that map 0 to 0, dropout, batch norm, and moves such as a transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprune.analysis.rules_recurrent import STATE_ARGUMENTS
from fxprune.operations import operation_name
from fxprune.program import Kind, Refusal

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Neurons
    from fxprune.policy import Protection
    from fxprune.program import Program

__all__ = ["ZERO_TO_ZERO", "Branch", "batch_normalized", "find_branches"]

ZERO_TO_ZERO = frozenset(
    "relu relu6 relu_ tanh tanh_ gelu silu silu_ elu leaky_relu hardswish dropout dropout_ "
    "feature_dropout neg clone contiguous to detach alias "
    "view reshape _unsafe_view flatten unflatten transpose permute squeeze unsqueeze getitem "
    "select slice flip max_pool1d max_pool2d avg_pool1d avg_pool2d".split()
)
"""Operations that give 0 where their first argument is 0."""

_PRODUCTS = frozenset("linear conv1d conv2d conv3d matmul mm lstm gru rnn".split())


@dataclass(frozen=True)
class Branch:
    """What is added to a shortcut.

    Attributes:
        name: the first weight in it.
        weights: all its weights, by which it is judged.
        outputs: the tensors that are 0 if it is to add nothing, with their number of dimensions.
        end: what it adds; nothing else reads that.
    """

    name: str
    weights: tuple[str, ...]
    outputs: Mapping[str, int]
    end: fx.Node


class _UnfitError(Exception):
    """Why a branch cannot be dropped."""


def find_branches(
    program: Program, neurons: Neurons, protection: Protection
) -> tuple[tuple[Branch, ...], tuple[Refusal, ...]]:
    """The branches of a program in execution order, and why others cannot be dropped.

    Args:
        program: the program; what its masks cut counts as there.
        neurons: its analysis.
        protection: no branch goes whose outputs are protected.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    users = {str(n.target): set(n.users) for n in order if n.op == "get_attr"}
    weights_of: dict[fx.Node, list[str]] = {}
    for block in neurons.blocks:
        weights_of.setdefault(block.consumer, []).extend(block.weights)
        for name in block.weights:
            users.setdefault(name, set()).add(block.consumer)
    branches, refusals = [], []
    for total in program.graph.nodes:
        for shortcut, end in _sums(total):
            inside = _inside(shortcut, end, order)
            weights = tuple(dict.fromkeys(w for n in inside for w in weights_of.get(n, ())))
            if not weights:
                continue
            try:
                outputs = dict(_outputs(program, end, {*inside, total}, set(weights_of)))
                for name in (*weights, *outputs):
                    if not _within(users[name], set(inside)):
                        raise _UnfitError(f"{name} is used outside of it as well")
                    if name in outputs and name in protection.tensors:
                        raise _UnfitError(f"{name} is protected")
            except _UnfitError as reason:
                refusals.append(Refusal(weights[0], f"its residual branch stays: {reason}"))
            else:
                branches.append(Branch(weights[0], weights, outputs, end))
    return tuple(branches), tuple(refusals)


def _sums(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Both ways to read a sum of two values of one shape: which is the shortcut?"""
    if operation_name(node) not in ("add", "add_") or node.kwargs or len(node.args) != 2:
        return
    a, b = node.args
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        values = a.meta.get("val"), b.meta.get("val")
        if all(isinstance(v, Tensor) for v in values) and values[0].shape == values[1].shape:  # type: ignore[union-attr]
            yield a, b
            yield b, a


def _inside(start: fx.Node, end: fx.Node, order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The nodes on the ways from one node to another, in order; none if there is no way."""
    seen, waiting = set(), [end]
    while waiting:
        node = waiting.pop()
        if node not in seen and order[node] > order[start]:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    reached = {start}
    inside = []
    for node in sorted(seen, key=order.__getitem__):
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            inside.append(node)
    return inside if end in reached else []


def _outputs(
    program: Program, end: fx.Node, inside: set[fx.Node], products: set[fx.Node]
) -> Iterator[tuple[str, int]]:
    """The tensors that decide what a branch adds, from its end backwards."""
    waiting: list[Any] = [end]
    while waiting:
        node = waiting.pop()
        name = operation_name(node)
        if node not in inside:
            raise _UnfitError("something from outside is part of what it adds")
        if not {u for u in node.users if u.users or u.op == "output"} <= inside:
            raise _UnfitError("what it adds is read elsewhere as well")
        if name in _PRODUCTS and node in products:
            states = [node.args[i] for i in STATE_ARGUMENTS.get(name, ())]
            if any(state is not None for state in states):
                raise _UnfitError("its recurrent layer starts from states other than 0")
            yield from _tensors(program, node, node.args[:1])
        elif name == "batch_norm":
            if not all(isinstance(n, fx.Node) for n in node.args[1:3]):
                raise _UnfitError("its batch norm has no gain and offset")
            for tensor in node.args[1:3]:
                yield from _named(program, tensor)
            waiting.append(node.args[0])
        elif name in ZERO_TO_ZERO:
            waiting.append(node.args[0])
        else:
            raise _UnfitError(f"it ends in {name}, which may be other than 0 where all weights are")


def _tensors(program: Program, node: fx.Node, values: Any) -> Iterator[tuple[str, int]]:
    for argument in node.all_input_nodes:
        if argument not in values:
            yield from _named(program, argument)


def _named(program: Program, node: Any) -> Iterator[tuple[str, int]]:
    name = str(node.target)
    if node.op != "get_attr" or program.kinds.get(name) is not Kind.PARAMETER:
        raise _UnfitError("a tensor that decides what it adds is computed, or fixed")
    yield name, program.tensors[name].dim()


def batch_normalized(neurons: Neurons) -> frozenset[str]:
    """The weights of products that a batch norm reads, at most by way of functions of one value."""
    return frozenset(
        name
        for b in neurons.blocks
        if operation_name(b.consumer) in _PRODUCTS and _reaches_batch_norm(b.consumer)
        for name in b.weights
    )


def _reaches_batch_norm(node: fx.Node) -> bool:
    return any(
        operation_name(user) == "batch_norm"
        or (operation_name(user) in ZERO_TO_ZERO and _reaches_batch_norm(user))
        for user in node.users
    )


def _within(users: set[fx.Node], inside: set[fx.Node]) -> bool:
    """Whether all that is computed from a tensor is computed inside; by way of moves of it, too."""
    return all(
        user in inside or (bool(user.users) and _within(set(user.users), inside)) for user in users
    )
