"""``fxprune::Recurrent`` -> one ONNX ``LSTM``, ``GRU`` or ``RNN`` node per layer and direction.

Handled::

    plain              node, and Squeeze of the dimension of the direction
    reverse            direction="reverse"
    two directions     one node with direction="bidirectional", where both read the same sequence
                       and lengths, have equal sizes, and their outputs meet in one Concat
    lengths            sequence_lens, as int32
    states of zeros    left out
    projection         R = w_hh w_hr, outputs times w_hr (see weights.py)
    projection, h_0    h_0 times the pseudo-inverse of w_hr; where there is none, h_0 becomes an
                       extra input of the first step, which adds w_hh h_0 there and nothing later
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from fxprune.lowering.building import (
    Constants,
    Emitter,
    constant_array,
    produced_by,
    replace_value,
)
from fxprune.lowering.markers import DOMAIN, RECURRENT, Layer
from fxprune.lowering.weights import Weights, hidden_size, inverse_projection

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["lower_recurrent"]

# Operations whose result is zero where their first input is.
_KEEP_ZERO = frozenset(
    "Cast CastLike Expand Gather Identity Reshape Slice Squeeze Transpose Unsqueeze".split()
)


def lower_recurrent(model: ir.Model, constants: Constants) -> tuple[str, ...]:
    """Replaces every recurrent marker; returns remarks on what the user may want to know."""
    layers = [
        _read(node)
        for node in model.graph.all_nodes()
        if node.domain == DOMAIN and node.op_type == RECURRENT
    ]
    notes = [note for layer in layers for note in _remarks(layer)]
    for directions in _paired(layers):
        # Read again: an input may have been replaced when the layer below was lowered.
        _lower([_read(layer.node) for layer in directions], constants)
    model.graph.sort()  # a merged node stands where its last direction stood
    return tuple(dict.fromkeys(notes))


def _lower(layers: Sequence[Layer], constants: Constants) -> None:
    first = layers[0]
    emit = Emitter(layers[-1].node, constants)
    weights = Weights(layers, emit)
    as_input = _state_enters_as_input(first)
    x = emit.concat([first.x, _first_step(first, emit)], 2) if as_input else first.x
    attributes: dict[str, object] = {
        "hidden_size": hidden_size(first),
        "direction": "bidirectional" if len(layers) > 1 else _direction(first),
    }
    if first.kind == "GRU":
        attributes["linear_before_reset"] = 1  # PyTorch applies the reset gate after W_hn h + b
    if first.kind == "RNN":
        attributes["activations"] = [layer.activation for layer in layers]
    y, *finals = emit.multiple(
        first.kind,
        x,
        weights.input(as_input),
        weights.recurrent(),
        weights.bias(),
        _sequence_lengths(first, emit),
        None if as_input else _initial_output(layers, weights, emit),
        *([_stacked([layer.c_0 for layer in layers], emit)] if first.kind == "LSTM" else []),
        outputs=len(first.node.outputs),
        **attributes,
    )
    if first.w_hr is not None:  # y [time, directions, batch, hidden]
        projection = weights.projection()
        y, finals[0] = emit("MatMul", y, projection), emit("MatMul", finals[0], projection)
    _connect(layers, y, finals, emit)


def _direction(layer: Layer) -> str:
    return "reverse" if layer.reverse else "forward"


def _sequence_lengths(layer: Layer, emit: Emitter) -> ir.Value | None:
    if layer.lengths is None or layer.lengths.dtype == ir.DataType.INT32:
        return layer.lengths
    return emit("Cast", layer.lengths, to=ir.DataType.INT32)


# -------------------------------------------------------------------------------- initial states


def _read(node: ir.Node) -> Layer:
    """The layer of a node, without states that are zero anyway."""
    layer = Layer.of(node)
    h_0 = None if _is_zero(layer.h_0) else layer.h_0
    c_0 = None if _is_zero(layer.c_0) else layer.c_0
    return replace(layer, h_0=h_0, c_0=c_0)


def _is_zero(value: ir.Value | None) -> bool:
    while value is not None:
        array = constant_array(value)
        if array is not None:
            return not array.any()
        node = value.producer()
        if node is None or node.domain != "":
            return False
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return fill is None or not fill.as_tensor().numpy().any()
        value = node.inputs[0] if node.op_type in _KEEP_ZERO else None
    return False


def _state_enters_as_input(layer: Layer) -> bool:
    return layer.w_hr is not None and layer.h_0 is not None and inverse_projection(layer) is None


def _initial_output(layers: Sequence[Layer], weights: Weights, emit: Emitter) -> ir.Value | None:
    h_0 = _stacked([layer.h_0 for layer in layers], emit)
    if h_0 is None or layers[0].w_hr is None:
        return h_0
    inverses = [inverse_projection(layer) for layer in layers]
    inverse = emit.constants.weight(
        ("inverse", *(id(layer.w_hr) for layer in layers)),
        lambda: np.stack([i for i in inverses if i is not None]),
        f"{layers[0].w_hr.name}_inverse",
    )
    return emit("MatMul", h_0, inverse)  # [directions, batch, hidden]


def _stacked(states: Sequence[ir.Value | None], emit: Emitter) -> ir.Value | None:
    """[batch, size] of each direction -> [directions, batch, size], undoing a selection."""
    given = [state for state in states if state is not None]
    if not given:
        return None
    source, first = _selected(given)
    if source is None:
        return emit.concat([emit.unsqueeze(state, 0) for state in given], 0)
    if source.shape is not None and source.shape[0] == len(given):
        return source
    ints = emit.constants.ints
    return emit("Slice", source, ints(first), ints(first + len(given)), ints(0))


def _selected(states: Sequence[ir.Value]) -> tuple[ir.Value | None, int]:
    """The tensor of which ``states`` are consecutive entries, and the first's index."""
    found = []
    for state in states:
        node = produced_by(state, "Gather")
        index = None if node is None else constant_array(node.inputs[1])
        if node is None or index is None or index.ndim or node.attributes.get_int("axis", 0):
            return None, 0
        found.append((node.inputs[0], int(index)))
    source, first = found[0]
    expected = [(source, first + step) for step in range(len(found))]
    return (source, first) if found == expected and first >= 0 else (None, 0)


def _first_step(layer: Layer, emit: Emitter) -> ir.Value:
    """h_0 at the step that runs first and zeros elsewhere, [time, batch, outputs]."""
    assert layer.h_0 is not None and layer.h_0.dtype is not None
    zero, one = emit.constants.scalar(0), emit.constants.scalar(1)
    time = emit.squeeze(emit("Shape", layer.x, start=0, end=1), 0)
    steps = emit.unsqueeze(emit("Range", zero, time, one), 1)  # [time, 1]
    if not layer.reverse:
        begins: ir.Value = zero
    else:
        begins = emit("Sub", time if layer.lengths is None else layer.lengths, one)
    mask = emit("Equal", steps, begins)  # [time, 1 or batch]
    nothing = emit.constants.scalar(0.0, layer.h_0.dtype)
    return emit("Where", emit.unsqueeze(mask, 2), emit.unsqueeze(layer.h_0, 0), nothing)


# ------------------------------------------------------------------------------------ directions


def _paired(layers: Sequence[Layer]) -> list[tuple[Layer, ...]]:
    """Forward layers with the reverse layer they merge with; the others alone."""
    reverse: dict[object, list[Layer]] = {}
    for layer in layers:
        if layer.reverse:
            reverse.setdefault(_likeness(layer), []).append(layer)
    groups: list[tuple[Layer, ...]] = []
    merged: set[ir.Node] = set()
    for layer in layers:
        if layer.reverse:
            continue
        for other in reverse.get(_likeness(layer), ()):
            if other.node not in merged and _mergeable(layer, other):
                merged.add(other.node)
                groups.append((layer, other))
                break
        else:
            groups.append((layer,))
    return groups + [(layer,) for layer in layers if layer.reverse and layer.node not in merged]


def _likeness(layer: Layer) -> object:
    """What two directions of one node have in common."""
    weights = (layer.w_ih, layer.w_hh, layer.w_hr)
    shapes = tuple(None if w is None else str(w.shape) for w in weights)
    return (
        layer.kind, id(layer.x), id(layer.lengths), shapes, layer.h_0 is None, layer.c_0 is None
    )  # fmt: skip


def _mergeable(forward: Layer, reverse: Layer) -> bool:
    return (
        bool(_joins(forward, reverse))
        and not _state_enters_as_input(forward)
        and not _state_enters_as_input(reverse)
        and not _depends(forward, reverse.node)
        and not _depends(reverse, forward.node)
    )


def _joins(forward: Layer, reverse: Layer) -> list[tuple[ir.Node, int]]:
    """Concat nodes over features that read both outputs side by side, and where."""
    y, z = forward.node.outputs[0], reverse.node.outputs[0]
    return [
        (node, index)
        for node, index in y.uses()
        if node.op_type == "Concat"
        and node.attributes["axis"].as_int() in (2, -1)
        and index + 1 < len(node.inputs)
        and node.inputs[index + 1] is z
    ]


def _depends(layer: Layer, on: ir.Node) -> bool:
    """Whether what only one direction reads comes from the other: then they cannot be one."""
    seen: set[ir.Node] = set()
    stack = [v for v in layer.node.inputs if v is not None and v is not layer.x]
    while stack:
        node = stack.pop().producer()
        if node is on:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack += [v for v in node.inputs if v is not None]
    return False


# --------------------------------------------------------------------------------------- results


def _connect(
    layers: Sequence[Layer], y: ir.Value, finals: Sequence[ir.Value], emit: Emitter
) -> None:
    """Hands the results of the node to the readers of the markers, and removes these."""
    if len(layers) == 1:
        (layer,) = layers
        replace_value(layer.node.outputs[0], emit.squeeze(y, 1))
        for old, new in zip(layer.node.outputs[1:], finals, strict=True):
            replace_value(old, emit.squeeze(new, 0))
    else:
        _connect_joined(layers, y, emit)
        for index, final in enumerate(finals, start=1):
            if any(_is_read(layer.node.outputs[index]) for layer in layers):
                parts = emit.multiple("Split", final, outputs=2, axis=0, num_outputs=2)
                for layer, part in zip(layers, parts, strict=True):
                    replace_value(layer.node.outputs[index], emit.squeeze(part, 0))
    for layer in layers:
        graph = layer.node.graph
        assert graph is not None
        graph.remove(layer.node, safe=True)


def _connect_joined(layers: Sequence[Layer], y: ir.Value, emit: Emitter) -> None:
    joins = _joins(*layers)
    features = 2 * _outputs(layers[0])
    by_batch = emit("Transpose", y, perm=[0, 2, 1, 3])  # [time, batch, 2, outputs]
    joined = emit("Reshape", by_batch, emit.constants.ints(0, 0, features))
    for node, index in joins:
        rest = [*node.inputs[:index], joined, *node.inputs[index + 2 :]]
        if len(rest) == 1:
            replace_value(node.outputs[0], joined)
        else:
            beside = Emitter(node, emit.constants)
            replace_value(node.outputs[0], beside("Concat", *rest, axis=2))
        assert node.graph is not None
        node.graph.remove(node, safe=True)
    for side, layer in enumerate(layers):
        output = layer.node.outputs[0]
        if _is_read(output):
            replace_value(output, emit("Gather", y, emit.constants.scalar(side), axis=1))


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _outputs(layer: Layer) -> int:
    size = layer.w_hh.shape[1] if layer.w_hh.shape is not None else None
    assert isinstance(size, int)
    return size


def _remarks(layer: Layer) -> list[str]:
    if layer.w_hr is None:
        return []
    gates = 4 * hidden_size(layer)
    notes = [
        f"{layer.w_hr.name} is folded into the recurrent weight, which grows from "
        f"[{gates}, {_outputs(layer)}] to [{gates}, {hidden_size(layer)}]"
    ]
    if _state_enters_as_input(layer):
        notes.append(
            f"{layer.w_hr.name} lacks full row rank: h_0 enters as an extra input of the first step"
        )
    return notes
