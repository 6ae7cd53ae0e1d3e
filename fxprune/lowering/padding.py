"""``fxprune::PadPacked`` -> Slice, Pad and Where, as far as they are needed.

Handled: time max(lengths); time ``total_length``, cut or padded; any padding value. The fill is
left out where the sequence comes straight from recurrent layers with the same lengths, whose
outputs are zero beyond them, and the padding value is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.lowering.building import Constants, Emitter, constant_array, replace_value
from fxprune.lowering.markers import DOMAIN, PAD_PACKED, RECURRENT, Layer

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["lower_padding"]


def lower_padding(model: ir.Model, constants: Constants) -> None:
    """Replaces every unpacking; runs while recurrent markers still tell their lengths."""
    for node in list(model.graph.all_nodes()):
        if node.domain == DOMAIN and node.op_type == PAD_PACKED:
            _lower(node, Emitter(node, constants))
            assert node.graph is not None
            node.graph.remove(node, safe=True)


def _lower(node: ir.Node, emit: Emitter) -> None:
    x, lengths, total = (*node.inputs, None)[:3]
    assert x is not None and lengths is not None
    value = node.attributes["padding_value"].as_float()
    ints = emit.constants.ints
    if total is None:
        longest = emit("ReduceMax", lengths, keepdims=1)  # [1]
        result = emit("Slice", x, ints(0), longest, ints(0))
    else:
        result = _fit(x, total, emit)
    if value or not _zero_beyond(x, lengths):
        assert x.dtype is not None
        result = _fill(result, lengths, emit.constants.scalar(value, x.dtype), emit)
    replace_value(node.outputs[0], result)


def _fit(x: ir.Value, total: ir.Value, emit: Emitter) -> ir.Value:
    """Cuts or pads time to ``total``, [1] or a scalar."""
    ints = emit.constants.ints
    length = constant_array(total)
    time = x.shape[0] if x.shape is not None else None
    if length is not None and isinstance(time, int) and time == int(length.item()):
        return x
    total = emit("Reshape", total, ints(1)) if length is None else ints(int(length.item()))
    missing = emit("Max", emit("Sub", total, emit("Shape", x, start=0, end=1)), ints(0))
    pads = emit.concat([ints(0, 0, 0), missing, ints(0, 0)], 0)  # at the end of time only
    return emit("Slice", emit("Pad", x, pads), ints(0), total, ints(0))


def _fill(x: ir.Value, lengths: ir.Value, padding: ir.Value, emit: Emitter) -> ir.Value:
    """Puts ``padding`` at every step at or beyond its sequence's length."""
    zero, one = emit.constants.scalar(0), emit.constants.scalar(1)
    time = emit.squeeze(emit("Shape", x, start=0, end=1), 0)
    steps = emit.unsqueeze(emit("Range", zero, time, one), 1)  # [time, 1]
    valid = emit.unsqueeze(emit("Less", steps, lengths), 2)  # [time, batch, 1]
    return emit("Where", valid, x, padding)


def _zero_beyond(x: ir.Value, lengths: ir.Value) -> bool:
    node = x.producer()
    if node is None:
        return False
    if node.op_type == "Concat":
        return all(v is not None and _zero_beyond(v, lengths) for v in node.inputs)
    if node.domain != DOMAIN or node.op_type != RECURRENT or node.outputs[0] is not x:
        return False
    return Layer.of(node).lengths is lengths
