"""``torch.export`` program -> ONNX model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnxscript import version_converter

from fxprune.errors import LoweringError
from fxprune.lowering.building import Constants, constant_array
from fxprune.lowering.compaction import fold_constants, share_weights, simplify, strip
from fxprune.lowering.exporter import export_graph, quiet
from fxprune.lowering.markers import DOMAIN, RECURRENT, Layer
from fxprune.lowering.opsets import chosen_opset
from fxprune.lowering.padding import lower_padding
from fxprune.lowering.precision import other_precision, to_float32
from fxprune.lowering.recurrent import lower_recurrent
from fxprune.lowering.signature import Signature, name_boundary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.export import ExportedProgram

__all__ = ["Lowered", "lower", "to_onnx"]

_LIMIT = 2**31 - 1  # bytes of a protobuf message


@dataclass(frozen=True)
class Lowered:
    """An ONNX model and what is worth knowing about it.

    Attributes:
        model: the model.
        signature: which inputs and outputs of the program it has.
        precision: what was written as float32, or None.
        notes: remarks for the report.
    """

    model: onnx.ModelProto
    signature: Signature
    precision: ir.DataType | None
    notes: tuple[str, ...]


def to_onnx(
    exported: ExportedProgram,
    *,
    input_names: Sequence[str],
    dimension_names: Mapping[str, Mapping[int, str]],
    opset: int | None = None,
) -> onnx.ModelProto:
    """Translates a program into a compact ONNX model.

    Args:
        exported: a program whose recurrent layers are fxprune's operations or ATen cells.
        input_names: names of the tensor inputs, in order.
        dimension_names: names of sizes that vary, by input and dimension.
        opset: version of the ONNX operator set; 20 if None.

    Returns:
        The model. Outputs are called ``output_0`` and so on.

    Raises:
        ConfigError: names or ``opset`` do not fit.
        LoweringError: an operation has no ONNX counterpart.
    """
    return lower(exported, input_names, dimension_names, opset).model


def lower(
    exported: ExportedProgram,
    input_names: Sequence[str],
    dimension_names: Mapping[str, Mapping[int, str]],
    opset: int | None = None,
) -> Lowered:
    """Does the work of :func:`to_onnx` and keeps what verification and report need."""
    opset = chosen_opset(opset)
    signature = Signature.of(exported)
    model = export_graph(exported, opset)
    with quiet():
        precision, notes = _lower_graph(model)
        _check_opset(model, opset)
        name_boundary(model, input_names, dimension_names)
        strip(model, exported.state_dict.keys() | exported.constants.keys())
    model.producer_name, model.producer_version = "fxprune", None
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if size > _LIMIT:
        raise LoweringError(
            f"the weights take {size / 2**30:.1f} GiB, and an ONNX file holds at most 2; prune "
            "more, or split the model."
        )
    notes += tuple(
        f"output {i} is always {value!r} and left out" for i, value in signature.constants.items()
    )
    proto = ir.to_proto(model)
    proto.graph.ClearField("value_info")  # shapes inside follow from those of the inputs
    return Lowered(proto, signature, precision, notes)


def _lower_graph(model: ir.Model) -> tuple[ir.DataType | None, tuple[str, ...]]:
    share_weights(model)
    notes: tuple[str, ...] = ()
    precision = other_precision(model)
    if precision is not None:
        to_float32(model)
        notes = (f"{_NAMES[precision]} written as float32",)
    if not _weights_are_constant(model):
        fold_constants(model)
    constants = Constants(model.graph)
    lower_padding(model, constants)
    notes += lower_recurrent(model, constants)
    simplify(model, constants)
    return precision, notes


_NAMES = {
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def _weights_are_constant(model: ir.Model) -> bool:
    layers = [
        Layer.of(n) for n in model.graph.all_nodes() if (n.domain, n.op_type) == (DOMAIN, RECURRENT)
    ]
    weights = [w for y in layers for w in (y.w_ih, y.w_hh, y.b_ih, y.b_hh, y.w_hr)]
    return all(w is None or constant_array(w) is not None for w in weights)


def _check_opset(model: ir.Model, opset: int) -> None:
    version_converter.convert_version(model, opset, fallback=True)
    reached = model.opset_imports.get("", opset)
    if reached != opset:
        raise LoweringError(
            f"the model cannot be written for opset {opset}, only for {reached}; ask for that."
        )
