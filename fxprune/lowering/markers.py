"""Recurrent operations as nodes of a private ONNX domain, while the rest is translated.

The exporter meets weights one at a time and by name only. Laying them out in ONNX order, merging
directions and folding projections wait until the whole graph is there
(:mod:`fxprune.lowering.recurrent`); until then one node, ``fxprune::Recurrent``, stands for each
layer and direction and for each step of a cell, and ``fxprune::PadPacked`` for unpacking.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnxscript.evaluator
import torch

import fxprune.tracing.packing
import fxprune.tracing.recurrent  # noqa: F401 - the two register the operations named below

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["DOMAIN", "PAD_PACKED", "RECURRENT", "Layer", "marker_translations"]

DOMAIN = "fxprune"
RECURRENT = "Recurrent"
PAD_PACKED = "PadPacked"
_INPUTS = 9

_Value = ir.Value | None


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer in one direction, read from its ``fxprune::Recurrent`` node.

    Attributes:
        node: outputs the sequence, the final state and, for LSTM, the final cell state.
        kind: ``LSTM``, ``GRU`` or ``RNN``.
        activation: ``Tanh`` or ``Relu``; only an RNN has the choice.
        reverse: whether it runs from the last valid step to the first.
        x: [time, batch, inputs].
        h_0: [batch, outputs], or None.
        c_0: [batch, hidden], or None.
        w_ih: [gates * hidden, inputs].
        w_hh: [gates * hidden, outputs].
        b_ih: [gates * hidden], or None.
        b_hh: [gates * hidden], or None.
        w_hr: [outputs, hidden], or None.
        lengths: [batch], or None.
    """

    node: ir.Node
    kind: str
    activation: str
    reverse: bool
    x: ir.Value
    h_0: _Value
    c_0: _Value
    w_ih: ir.Value
    w_hh: ir.Value
    b_ih: _Value
    b_hh: _Value
    w_hr: _Value
    lengths: _Value

    @classmethod
    def of(cls, node: ir.Node) -> Layer:
        """Reads a node; absent inputs at the end may have been cut off."""
        inputs = (*node.inputs, *[None] * _INPUTS)[:_INPUTS]
        return cls(
            node,
            node.attributes["kind"].as_string(),
            node.attributes["activation"].as_string(),
            bool(node.attributes["reverse"].as_int()),
            *inputs,  # type: ignore[arg-type]  # in the order of the fields
        )


def marker_translations() -> dict[Any, Callable[..., Any]]:
    """What the exporter calls for each operation, by operation."""
    markers, aten = torch.ops.fxprune, torch.ops.aten
    return {
        markers.lstm.default: _lstm,
        markers.gru.default: _gru,
        markers.rnn.default: _rnn,
        markers.pad_packed.default: _pad_packed,
        aten.lstm_cell.default: _lstm_cell,
        aten.gru_cell.default: partial(_cell, "GRU", "Tanh"),
        aten.rnn_tanh_cell.default: partial(_cell, "RNN", "Tanh"),
        aten.rnn_relu_cell.default: partial(_cell, "RNN", "Relu"),
    }


def _record(
    op_type: str, inputs: Sequence[_Value], outputs: int, domain: str = DOMAIN, **attributes: Any
) -> Sequence[ir.Value]:
    """Adds a node to the graph that the exporter is building."""
    recorder: Any = onnxscript.evaluator.default()
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
    recorder.nodes.append(node)
    return node.outputs


def _constant(values: Sequence[int]) -> ir.Value:
    return _record("Constant", (), 1, domain="", value_ints=list(values))[0]


def _recurrent(
    kind: str,
    x: _Value,
    states: Sequence[_Value],
    weights: Sequence[_Value],
    w_hr: _Value = None,
    lengths: _Value = None,
    *,
    reverse: bool = False,
    activation: str = "Tanh",
) -> Sequence[ir.Value]:
    h_0, c_0 = (*states, None)[:2]
    return _record(
        RECURRENT,
        (x, h_0, c_0, *weights, w_hr, lengths),
        3 if kind == "LSTM" else 2,
        kind=kind,
        activation=activation,
        reverse=int(reverse),
    )


def _lstm(
    x: _Value,
    h_0: _Value,
    c_0: _Value,
    w_ih: _Value,
    w_hh: _Value,
    b_ih: _Value = None,
    b_hh: _Value = None,
    w_hr: _Value = None,
    lengths: _Value = None,
    reverse: bool = False,
) -> Sequence[ir.Value]:
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _recurrent("LSTM", x, (h_0, c_0), weights, w_hr, lengths, reverse=reverse)


def _gru(
    x: _Value,
    h_0: _Value,
    w_ih: _Value,
    w_hh: _Value,
    b_ih: _Value = None,
    b_hh: _Value = None,
    lengths: _Value = None,
    reverse: bool = False,
) -> Sequence[ir.Value]:
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _recurrent("GRU", x, (h_0,), weights, None, lengths, reverse=reverse)


def _rnn(
    x: _Value,
    h_0: _Value,
    w_ih: _Value,
    w_hh: _Value,
    b_ih: _Value = None,
    b_hh: _Value = None,
    lengths: _Value = None,
    reverse: bool = False,
    nonlinearity: str = "tanh",
) -> Sequence[ir.Value]:
    weights = (w_ih, w_hh, b_ih, b_hh)
    activation = nonlinearity.capitalize()
    return _recurrent(
        "RNN", x, (h_0,), weights, None, lengths, reverse=reverse, activation=activation
    )


def _lstm_cell(
    x: _Value,
    states: Sequence[_Value],
    w_ih: _Value,
    w_hh: _Value,
    b_ih: _Value = None,
    b_hh: _Value = None,
) -> Sequence[ir.Value]:
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _recurrent("LSTM", _one_step(x), states, weights)[1:]


def _cell(
    kind: str,
    activation: str,
    x: _Value,
    h_0: _Value,
    w_ih: _Value,
    w_hh: _Value,
    b_ih: _Value = None,
    b_hh: _Value = None,
) -> ir.Value:
    weights = (w_ih, w_hh, b_ih, b_hh)
    return _recurrent(kind, _one_step(x), (h_0,), weights, activation=activation)[1]


def _one_step(x: _Value) -> ir.Value:
    return _record("Unsqueeze", (x, _constant([0])), 1, domain="")[0]  # [1, batch, inputs]


def _pad_packed(
    x: _Value,
    lengths: _Value,
    total_length: ir.Value | int | None = None,
    padding_value: float = 0.0,
) -> ir.Value:
    if isinstance(total_length, int):
        total_length = _constant([total_length])
    (result,) = _record(PAD_PACKED, (x, lengths, total_length), 1, padding_value=padding_value)
    return result
