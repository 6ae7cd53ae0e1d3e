"""Recurrent states at the model's boundary: inputs that only start, outputs that only end them.

Such a tensor can keep its external size while the units inside are removed: the state is indexed
on the way in and filled with zeros on the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprune.analysis.walker import operation_name

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["Boundary", "find_boundary", "outward_users"]

_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
_STATE_ARGUMENTS = {"lstm": (1, 2), "gru": (1,), "rnn": (1,), **dict.fromkeys(_CELLS, (1,))}
_THROUGH = (
    "select",
    "slice",
    "squeeze",
    "unsqueeze",
    "to",
    "contiguous",
    "clone",
    "expand",
    "enter_state",
)
_AROUND = ("stack", "unsqueeze", "squeeze", "contiguous", "clone", "transpose", "leave_state")


@dataclass(frozen=True)
class Boundary:
    """States at the boundary of a program.

    Attributes:
        inputs: placeholders that only start states, and the nodes between them and the layers.
        outputs: results that only end states, each with the final states it is made of; those
            between layer and output are in ``between``.
        between: nodes that only arrange final states for the output.
    """

    inputs: frozenset[fx.Node]
    outputs: dict[fx.Node, tuple[fx.Node, ...]]
    between: frozenset[fx.Node]


def find_boundary(program: Program) -> Boundary:
    """Finds the states at the boundary of a program."""
    inputs: set[fx.Node] = set()
    outputs: dict[fx.Node, tuple[fx.Node, ...]] = {}
    between: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            chain = _starts_states(node)
            inputs.update(chain or ())
        elif node.op == "output":
            for result in node.args[0]:
                if isinstance(result, fx.Node):
                    parts: list[fx.Node] = []
                    inner: set[fx.Node] = set()
                    if _ends_states(result, node, parts, inner):
                        outputs[result] = tuple(parts)
                        between |= inner
    return Boundary(frozenset(inputs), outputs, frozenset(between))


def _starts_states(node: fx.Node) -> set[fx.Node] | None:
    """The nodes from here to initial states; None if the value goes anywhere else."""
    if not node.users:
        return None
    chain = {node}
    for user in node.users:
        name = operation_name(user) if user.op == "call_function" else ""
        if name in _STATE_ARGUMENTS and _only_state(user, node):
            continue
        if name == "sym_size":  # of a dimension that varies, which holds no neurons
            continue
        last = node.meta["val"].dim() - 1
        if name in _THROUGH and _keeps_last(user, last):
            further = _starts_states(user)
            if further is not None:
                chain |= further
                continue
        return None
    return chain


def _only_state(user: fx.Node, node: fx.Node) -> bool:
    states = [user.args[i] for i in _STATE_ARGUMENTS[operation_name(user)]]
    flat = [s for group in states for s in (group if isinstance(group, (list, tuple)) else [group])]
    others: list[Any] = []
    for i, argument in enumerate(user.args):
        if i not in _STATE_ARGUMENTS[operation_name(user)]:
            others.append(argument)
    return node in flat and node not in others


def _keeps_last(user: fx.Node, last: int) -> bool:
    name = operation_name(user)
    if name in ("select", "slice", "squeeze"):
        dims: Any = user.args[1] if len(user.args) > 1 else 0
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        return all(d % (last + 1) != last for d in dims)
    if name == "unsqueeze":
        return int(user.args[1]) % (last + 2) != last + 1  # type: ignore[arg-type]
    if name == "expand":
        return isinstance(user.meta["val"].shape[-1], int)
    return True


def _ends_states(node: fx.Node, user: fx.Node, parts: list[fx.Node], between: set[fx.Node]) -> bool:
    """Whether a value is final states only, arranged by nodes that nothing else uses."""
    if _is_final_state(node):
        parts.append(node)
        return True
    if node.op != "call_function" or operation_name(node) not in _AROUND:
        return False
    if set(node.users) != {user}:
        return False
    if operation_name(node) == "transpose":
        last = node.meta["val"].dim() - 1
        if last in (int(node.args[1]) % (last + 1), int(node.args[2]) % (last + 1)):  # type: ignore[arg-type]
            return False
    between.add(node)
    sources = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
    return all(isinstance(s, fx.Node) and _ends_states(s, node, parts, between) for s in sources)


def _is_final_state(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = operation_name(node)
    if name in _CELLS:
        return name != "lstm_cell"
    if name != "getitem":
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    name = operation_name(source)
    return name == "lstm_cell" or (name in _STATE_ARGUMENTS and int(str(node.args[1])) > 0)


def outward_users(state: fx.Node) -> list[fx.Node]:
    """The users of a final state that lead to the model's output and nowhere else."""

    def leads_out(node: fx.Node) -> bool:
        if node.op == "output":
            return True
        arranges = node.op == "call_function" and operation_name(node) in _AROUND
        return arranges and bool(node.users) and all(leads_out(u) for u in node.users)

    return [u for u in list(state.users) if leads_out(u)]
