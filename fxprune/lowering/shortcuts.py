"""Small exact rewrites that take out what translation one operation at a time leaves behind.

Each ``_x_to_y`` looks at one node and returns what its output may be replaced by, or None::

    Squeeze(Unsqueeze(x, a), a), and the reverse           x
    Gather(Concat(x, y, ...; axis 0), i) of parts [1, ..]  Squeeze of the part: stack, then select
    SequenceAt(SplitToSequence(x, 1), i): unbind           Gather(x, i)
    Concat of all outputs of one Split, in order           the input of the Split
    Gather(Transpose(x), i) with scalar i                  Gather(x, i) on the axis before
    Transpose(Reshape(Transpose(bidirectional output)))    Reshape(Transpose): batch first at once
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fxprune.lowering.building import (
    Constants,
    Emitter,
    constant_array,
    produced_by,
    replace_value,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["take_shortcuts"]


def take_shortcuts(model: ir.Model, constants: Constants) -> bool:
    """Applies every rewrite wherever it fits, until none does; tells whether any did."""
    changed = False
    again = True
    while again:
        again = False
        for node in list(model.graph.all_nodes()):
            if node.graph is None or len(node.outputs) != 1:
                continue
            again |= _shorten(node, constants)
        changed |= again
    return changed


def _shorten(node: ir.Node, constants: Constants) -> bool:
    rewrite = _REWRITES.get(node.op_type) if node.domain == "" else None
    found = None if rewrite is None else rewrite(node, Emitter(node, constants))
    if found is None:
        return False
    replace_value(node.outputs[0], found)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return True


def _squeeze_unsqueeze_to_input(node: ir.Node, emit: Emitter) -> ir.Value | None:
    inverse = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}[node.op_type]
    inner = produced_by(node.inputs[0], inverse)
    if inner is None or len(inner.inputs) < 2 or len(node.inputs) < 2:
        return None
    outer_axes, inner_axes = constant_array(node.inputs[1]), constant_array(inner.inputs[1])
    if outer_axes is None or inner_axes is None or outer_axes.tolist() != inner_axes.tolist():
        return None
    return inner.inputs[0]


def _gather_to_shorter(node: ir.Node, emit: Emitter) -> ir.Value | None:
    index = constant_array(node.inputs[1])
    if index is None or index.ndim:
        return None
    return _stacked_part(node, int(index), emit) or _before_transpose(node, emit)


def _stacked_part(node: ir.Node, index: int, emit: Emitter) -> ir.Value | None:
    stack = produced_by(node.inputs[0], "Concat")
    if stack is None or _axis(node) or _axis(stack):
        return None
    if any(v is None or v.shape is None or v.shape[0] != 1 for v in stack.inputs):
        return None
    if not -len(stack.inputs) <= index < len(stack.inputs):
        return None
    part = stack.inputs[index]
    assert part is not None
    return emit.squeeze(part, 0)


def _unbound_to_gather(node: ir.Node, emit: Emitter) -> ir.Value | None:
    split = produced_by(node.inputs[0], "SplitToSequence")
    index = constant_array(node.inputs[1])
    if split is None or index is None:
        return None
    if "keepdims" not in split.attributes or split.attributes["keepdims"].as_int():
        return None
    size = constant_array(split.inputs[1]) if len(split.inputs) > 1 else np.array(1)
    if size is None or size.tolist() != 1:
        return None
    at = emit.constants.scalar(int(index))
    return emit("Gather", split.inputs[0], at, axis=_axis(split))


def _before_transpose(node: ir.Node, emit: Emitter) -> ir.Value | None:
    transpose = produced_by(node.inputs[0], "Transpose")
    if transpose is None or "perm" not in transpose.attributes:
        return None
    order = list(transpose.attributes["perm"].as_ints())
    axis = order.pop(_axis(node))
    if order != sorted(order):
        return None
    return emit("Gather", transpose.inputs[0], node.inputs[1], axis=axis)


def _concat_split_to_input(node: ir.Node, emit: Emitter) -> ir.Value | None:
    first = node.inputs[0]
    split = produced_by(first, "Split")
    if split is None or tuple(node.inputs) != tuple(split.outputs):
        return None
    same_axis = _axis(node) == _axis(split)
    return split.inputs[0] if same_axis else None


def _transpose_joined_directions(node: ir.Node, emit: Emitter) -> ir.Value | None:
    reshape = produced_by(node.inputs[0], "Reshape")
    if reshape is None or _perm(node) != [1, 0, 2]:
        return None
    shape = constant_array(reshape.inputs[1])
    inner = produced_by(reshape.inputs[0], "Transpose")
    if inner is None or _perm(inner) != [0, 2, 1, 3]:  # [time, batch, directions, outputs]
        return None
    if shape is None or shape.size != 3 or shape[:2].any() or len(reshape.outputs[0].uses()) > 1:
        return None
    by_batch = emit("Transpose", inner.inputs[0], perm=[2, 0, 1, 3])
    return emit("Reshape", by_batch, reshape.inputs[1])


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []


_REWRITES = {
    "Concat": _concat_split_to_input,
    "Gather": _gather_to_shorter,
    "SequenceAt": _unbound_to_gather,
    "Squeeze": _squeeze_unsqueeze_to_input,
    "Transpose": _transpose_joined_directions,
    "Unsqueeze": _squeeze_unsqueeze_to_input,
}
