"""Rules for recurrent layers and cells.

Unit ``k`` of a layer owns row ``k`` of every gate block of both weights and biases, column ``k``
of the recurrent weight, and entry ``k`` of its states. With a projection, the outputs are other
neurons than the units: the projection connects them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from fxprune.analysis.contracting import connect, meet, weight_axis
from fxprune.analysis.labels import Axis
from fxprune.operations import operation_name

if TYPE_CHECKING:
    from fxprune.analysis.walker import Label, Walker

__all__ = ["INPUT_WEIGHT", "RULES", "STATE_ARGUMENTS"]

STATE_ARGUMENTS = {"lstm": (1, 2), "gru": (1,), "rnn": (1,)}
"""Positions of the initial states of each recurrent operation."""

_CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")

INPUT_WEIGHT = {"lstm": 3, "gru": 2, "rnn": 2, **dict.fromkeys(_CELLS, 2)}
"""Position of the input weight of each recurrent layer and cell; the recurrent one is next."""


def lstm(w: Walker, node: fx.Node) -> list[Label]:
    """Outputs, final output and final cell state of one LSTM layer and direction."""
    x, h_0, c_0, w_ih, w_hh, b_ih, b_hh, w_hr = (*node.args, None, None, None)[:8]
    units = _units(w, node, x, w_ih, b_ih, b_hh, 4)
    outputs = units
    if w_hr is not None:
        outputs, columns = weight_axis(w, w_hr, 0), weight_axis(w, w_hr, 1)
        w.ledger.unify(columns, units)
        connect(w, node, (7,), columns.reshape(1, -1), outputs.reshape(-1, 1))
    _recur(w, node, w_hh, units, outputs, 4)
    _state(w, node, h_0, outputs)
    _state(w, node, c_0, units)
    w.units.append((node.name, units))
    return [_last(outputs, 3), _last(outputs, 2), _last(units, 2)]


def gated(w: Walker, node: fx.Node) -> list[Label]:
    """Outputs and final state of one GRU or Elman layer and direction."""
    x, h_0, w_ih, w_hh, b_ih, b_hh = (*node.args, None, None)[:6]
    gates = 3 if operation_name(node) == "gru" else 1
    units = _units(w, node, x, w_ih, b_ih, b_hh, gates)
    _recur(w, node, w_hh, units, units, gates)
    _state(w, node, h_0, units)
    w.units.append((node.name, units))
    return [_last(units, 3), _last(units, 2)]


def cell(w: Walker, node: fx.Node) -> Any:
    """One step of an LSTM, GRU or Elman cell."""
    x, state, w_ih, w_hh, b_ih, b_hh = (*node.args, None, None)[:6]
    name = operation_name(node)
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(name, 1)
    units = _units(w, node, x, w_ih, b_ih, b_hh, gates)
    _recur(w, node, w_hh, units, units, gates)
    w.units.append((node.name, units))
    states: Any = state if name == "lstm_cell" else [state]
    for s in states:
        _state(w, node, s, units)
    result = _last(units, len(w.shape(states[0])))
    return [result, result] if name == "lstm_cell" else result


def _units(w: Walker, node: fx.Node, x: Any, w_ih: Any, b_ih: Any, b_hh: Any, gates: int) -> Tensor:
    """The units of a layer: rows of all gate blocks are one, and so are the biases'."""
    rows, columns = weight_axis(w, w_ih, 0), weight_axis(w, w_ih, 1)
    meet(w, x, len(w.shape(x)) - 1, columns)
    units = _one_per_gate(w, rows, gates)
    for bias in (b_ih, b_hh):
        if isinstance(bias, fx.Node):
            for axis in w.label(bias):
                w.ledger.unify(axis.ids.reshape(gates, -1), units.unsqueeze(0))
    connect(
        w, node, (INPUT_WEIGHT[operation_name(node)],), columns.reshape(1, -1), rows.reshape(-1, 1)
    )
    return units


def _one_per_gate(w: Walker, rows: Tensor, gates: int) -> Tensor:
    blocks = rows.reshape(gates, -1)
    w.ledger.unify(blocks, blocks[:1])
    return blocks[0]


def _recur(w: Walker, node: fx.Node, w_hh: Any, units: Tensor, outputs: Tensor, gates: int) -> None:
    rows, columns = weight_axis(w, w_hh, 0), weight_axis(w, w_hh, 1)
    w.ledger.unify(rows.reshape(gates, -1), units.unsqueeze(0))
    w.ledger.unify(columns, outputs)
    connect(
        w,
        node,
        (INPUT_WEIGHT[operation_name(node)] + 1,),
        columns.reshape(1, -1),
        rows.reshape(-1, 1),
    )


def _state(w: Walker, node: fx.Node, state: Any, neurons: Tensor) -> None:
    if not isinstance(state, fx.Node):
        return
    if w.is_boundary(state):
        w.entries.append((node, state, neurons))
    else:
        meet(w, state, len(w.shape(state)) - 1, neurons)


def _last(neurons: Tensor, rank: int) -> Label:
    return (Axis(neurons.reshape((1,) * (rank - 1) + (-1,))),)


RULES: dict[str, Any] = {
    "lstm": lstm,
    "gru": gated,
    "rnn": gated,
    **dict.fromkeys(_CELLS, cell),
}
