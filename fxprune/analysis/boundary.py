"""Recurrent states at the model's boundary: inputs that only start, outputs that only end them.

Such a tensor can keep its external size while the units inside are removed: the state is indexed
on the way in and filled with zeros on the way out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.analysis.rules_recurrent import INPUT_WEIGHT
from fxprune.operations import operation_name

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
        outputs: results that only end states.
        final_states: the states they are made of, each once.
        between: nodes that only arrange final states for the output.
    """

    inputs: frozenset[fx.Node]
    outputs: frozenset[fx.Node]
    final_states: tuple[fx.Node, ...]
    between: frozenset[fx.Node]


def find_boundary(program: Program) -> Boundary:
    """Finds the states at the boundary of a program."""
    inputs: set[fx.Node] = set()
    outputs: dict[fx.Node, list[fx.Node]] = {}
    between: set[fx.Node] = set()
    finals = _final_states(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            chain = _starts_states(node)
            inputs.update(chain or ())
        elif node.op == "output":
            for result in node.args[0]:
                if isinstance(result, fx.Node):
                    parts: list[fx.Node] = []
                    inner: set[fx.Node] = set()
                    if _ends_states(result, node, finals, parts, inner):
                        outputs[result] = parts
                        between |= inner
    states = dict.fromkeys(part for parts in outputs.values() for part in parts)
    return Boundary(frozenset(inputs), frozenset(outputs), tuple(states), frozenset(between))


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
    positions = _STATE_ARGUMENTS[operation_name(user)]
    others = [argument for i, argument in enumerate(user.args) if i not in positions]
    return node in _states_of(user) and node not in others


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


def _ends_states(
    node: fx.Node,
    user: fx.Node,
    finals: set[fx.Node],
    parts: list[fx.Node],
    between: set[fx.Node],
) -> bool:
    """Whether a value is final states only, arranged by nodes that nothing else uses."""
    if node in finals:
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
    return all(
        isinstance(s, fx.Node) and _ends_states(s, node, finals, parts, between) for s in sources
    )


def _final_states(graph: fx.Graph) -> set[fx.Node]:
    """States that recurrent operations leave behind and that no later step goes on from.

    What a loop carries from step to step is a feature like any other where it is returned. A later
    step is one of the same weights that depends on the state, or one of others that starts with it.
    """
    bits: dict[Any, int] = {}  # a bit for each recurrent weight
    later: dict[fx.Node, int] = {}  # the weights of the steps that depend on a value
    starting: set[fx.Node] = set()  # values that some step starts with
    finals: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        later[node] = 0
        for user in filter(_reads_values, node.users):
            weight = _recurrent_weight(user)
            later[node] |= later[user]
            if weight is not None:
                later[node] |= bits.setdefault(weight, 1 << len(bits))
                begins = node in _states_of(user)
            else:
                begins = user in starting and _carries(user)
            if begins:
                starting.add(node)
        source = _step_that_leaves(node)
        if source is not None and node not in starting:
            weight = _recurrent_weight(source)
            if not later[node] & bits.get(weight, 0):
                finals.add(node)
    return finals


def _reads_values(user: fx.Node) -> bool:
    """Whether an operation reads more than the shape of what it is given."""
    if user.op != "call_function" or not isinstance(user.meta.get("val"), (Tensor, list, tuple)):
        return False
    name = operation_name(user)
    return not name.startswith("new_") and not name.endswith("_like")


def _carries(node: fx.Node) -> bool:
    """Whether a state is still one after an operation: moved, dropped out, activated."""
    name = operation_name(node)
    tags = getattr(node.target, "tags", ())
    return name in (*_THROUGH, *_AROUND, "cat", "dropout") or torch.Tag.pointwise in tags


def _recurrent_weight(node: fx.Node) -> Any:
    """What a recurrent operation reads as its recurrent weight; None for other operations."""
    position = INPUT_WEIGHT.get(operation_name(node))
    if position is None:
        return None
    weight: Any = node.args[position + 1]
    return weight.target if weight.op == "get_attr" else weight


def _states_of(node: fx.Node) -> list[Any]:
    """The initial states of a recurrent operation."""
    states = [node.args[i] for i in _STATE_ARGUMENTS[operation_name(node)]]
    return [s for group in states for s in (group if isinstance(group, (list, tuple)) else [group])]


def _step_that_leaves(node: fx.Node) -> fx.Node | None:
    """The recurrent operation that leaves a value behind as its state."""
    if node.op != "call_function":
        return None
    name = operation_name(node)
    if name in _CELLS:
        return None if name == "lstm_cell" else node
    source = node.args[0]
    if name != "getitem" or not isinstance(source, fx.Node):
        return None
    name = operation_name(source)
    leaves = name == "lstm_cell" or (name in _STATE_ARGUMENTS and int(str(node.args[1])) > 0)
    return source if leaves else None


def outward_users(state: fx.Node) -> list[fx.Node]:
    """The users of a final state that lead to the model's output and nowhere else.

    Args:
        state: in the graph that was analysed, so that nothing made since is among them.
    """

    def leads_out(node: fx.Node) -> bool:
        if node.op == "output":
            return True
        arranges = node.op == "call_function" and operation_name(node) in _AROUND
        return arranges and bool(node.users) and all(leads_out(u) for u in node.users)

    return [u for u in state.users if leads_out(u)]
