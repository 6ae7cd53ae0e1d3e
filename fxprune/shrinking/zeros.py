"""Sums lose the terms that masks have made zero everywhere.

A product of which no connection is left gives its bias; if that is zero, so is the product, and so
is what follows it through functions that take zero to zero: activations, moves, a batch norm whose
gain and offset are zero, a recurrent layer that starts from zeros. Where such a value is added to
another of its shape, as a residual branch is to its shortcut, the sum is the other, and what led to
the zero goes with all its tensors.

A product is zero here because masks took its connections, never because its weights happen to be
zero: a branch that begins at zero and is still to be trained stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprune.analysis.rules_recurrent import STATE_ARGUMENTS
from fxprune.masking.branches import ZERO_TO_ZERO
from fxprune.operations import operation_name

if TYPE_CHECKING:
    from collections.abc import Collection

    from fxprune.program import Program

__all__ = ["drop_zero_terms"]

_SUMS = {"add": (0, 1), "add_": (0, 1), "sub": (1,)}
"""Which terms of a sum may be left out."""


def drop_zero_terms(program: Program, silent: Collection[str]) -> Program:
    """The program without terms that are zero, and without what only they needed.

    Args:
        program: a program whose masks are in its weights; stays as it is.
        silent: names of the weights of which masks left no connection.
    """
    if not silent:
        return program
    graph, _ = program.copy_graph()
    zeros = _Zeros(program, frozenset(silent), set())
    for node in list(graph.nodes):
        other = zeros.visit(node)
        if other is not None:
            node.replace_all_uses_with(other)
            _erase(graph, node)
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    gone = names - {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    tensors = {n: t for n, t in program.tensors.items() if n not in gone}
    return program.with_graph(graph, tensors) if gone else program


@dataclass(frozen=True)
class _Zeros:
    """The values known to be zero so far, in execution order."""

    program: Program
    silent: frozenset[str]
    found: set[fx.Node]

    def visit(self, node: fx.Node) -> fx.Node | None:
        """Notes whether a value is zero; returns what it equals if it is a sum with zero."""
        if node.op != "call_function":
            return None
        name = operation_name(node)
        if name in _SUMS and not node.kwargs and len(node.args) == 2:
            for position in _SUMS[name]:
                term, other = node.args[position], node.args[1 - position]
                if term in self.found and _alike(other, node):
                    return other  # type: ignore[return-value]
        elif self._is_zero(node, name):
            self.found.add(node)
        return None

    def _is_zero(self, node: fx.Node, name: str) -> bool:
        x, *tensors = node.args
        if name in ZERO_TO_ZERO:
            return x in self.found
        if name == "batch_norm":
            gain, offset = tensors[:2]
            silenced = gain is not None and self._all_zero(gain)  # without a gain it is 1
            return x in self.found and silenced and self._all_zero(offset)
        if name in ("linear", "conv1d", "conv2d", "conv3d"):
            return self._is_silent(tensors[0]) and self._all_zero([*tensors, None][1])
        if name in STATE_ARGUMENTS:
            states = [node.args[i] for i in STATE_ARGUMENTS[name]]
            given = [t for t in node.all_input_nodes if t is not x]
            return all(s is None for s in states) and all(
                self._is_silent(t) or self._all_zero(t) for t in given
            )
        return False

    def _is_silent(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.op == "get_attr" and node.target in self.silent

    def _all_zero(self, node: Any) -> bool:
        """Whether a bias is absent or zero."""
        if node is None:
            return True
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return False
        tensor = self.program.tensors[str(node.target)]
        return tensor.dim() == 1 and not bool(tensor.detach().any())


def _alike(value: Any, like: fx.Node) -> bool:
    """Whether a value has the shape and type of another."""
    if not isinstance(value, fx.Node):
        return False
    one, other = value.meta.get("val"), like.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.shape == other.shape and one.dtype == other.dtype


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Removes a node that nothing uses, and what only it used."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        _erase(graph, source)
