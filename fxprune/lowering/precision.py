"""Writing a model as float32: onnxruntime has no other recurrent kernels on the CPU."""

from __future__ import annotations

import onnx_ir as ir

from fxprune.lowering.markers import DOMAIN, RECURRENT, Layer

__all__ = ["other_precision", "to_float32"]

_FLOAT32 = ir.DataType.FLOAT
_OTHERS = (ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TYPE_ATTRIBUTES = ("dtype", "to")  # of Cast, EyeLike, RandomNormal, ...


def other_precision(model: ir.Model) -> ir.DataType | None:
    """The precision a model must leave to run: that of a recurrent layer, if not float32.

    A 16-bit model without recurrent layers leaves it too, as few CPU kernels exist for it.
    """
    layers = [
        Layer.of(node)
        for node in model.graph.all_nodes()
        if node.domain == DOMAIN and node.op_type == RECURRENT
    ]
    for layer in layers:
        if layer.w_hh.dtype in _OTHERS:
            return layer.w_hh.dtype
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    return next((v.dtype for v in values if v.dtype in _OTHERS[1:]), None)


def to_float32(model: ir.Model) -> None:
    """Turns every double, half and bfloat16 in a graph into float32, the inputs included."""
    graph = model.graph
    for value in [*graph.inputs, *graph.initializers.values()]:
        _retype(value)
        tensor = value.const_value
        if tensor is not None:
            value.const_value = _converted(tensor)
    for node in graph.all_nodes():
        for value in node.outputs:
            _retype(value)
        for attribute in list(node.attributes.values()):
            _convert_attribute(node, attribute)


def _retype(value: ir.Value) -> None:
    if value.dtype in _OTHERS:
        value.type = ir.TensorType(_FLOAT32)


def _converted(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype not in _OTHERS:
        return tensor
    return ir.Tensor(tensor.numpy().astype(_FLOAT32.numpy()), name=tensor.name)


def _convert_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    name = attribute.name
    if attribute.type == ir.AttributeType.TENSOR:
        node.attributes[name] = ir.AttrTensor(name, _converted(attribute.as_tensor()))
    elif attribute.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES:
        if attribute.as_int() in _OTHERS:
            node.attributes[name] = ir.AttrInt64(name, _FLOAT32)
