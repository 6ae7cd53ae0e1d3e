"""``torch.export`` program -> ONNX graph, with recurrent operations kept as single nodes.

The part of torch's ONNX exporter that fxprune uses. ``torch.onnx.export`` itself builds its table
of about 500 translations in every call (0.9 s) and retraces every program (0.2 to 0.9 s); here the
table is built once per opset, and a program is retraced only if an operation wants it. This is
the only file that reaches into torch's private exporter.
"""

from __future__ import annotations

import copy
import logging
import operator
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx
from torch.export.graph_signature import OutputKind
from torch.onnx._internal.exporter import _constants, _core, _decomp, _fx_passes, _registration
from torch.onnx._internal.exporter._errors import ConversionError

from fxprune.errors import LoweringError
from fxprune.lowering.markers import marker_translations
from fxprune.lowering.translations import extra_translations
from fxprune.operations import is_mutable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.export import ExportedProgram

__all__ = ["export_graph", "quiet"]


def export_graph(exported: ExportedProgram, opset: int) -> ir.Model:
    """Translates a program; recurrent operations and unpacking stay nodes of the fxprune domain.

    Raises:
        LoweringError: an operation has no ONNX translation, or the program changes its buffers.
    """
    _refuse_mutation(exported)
    translations = _translations(opset)
    with quiet(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        prepared = _prepared(exported, translations)
        _refuse_unknown(prepared, translations)
        try:
            program = _core._exported_program_to_onnx_program(
                prepared, registry=translations.registry
            )
        except ConversionError as error:
            raise _failure(prepared, error) from error
    model = program.model
    model.opset_imports.setdefault("", _constants.TORCHLIB_OPSET)  # absent if all is recurrent
    _settle_sizes(model)
    if not _sizes_are_sound(exported):
        _forget_shapes(model)
    return model


@dataclass(frozen=True)
class _Translations:
    """Which operations have an ONNX translation, and how to decompose the others."""

    registry: _registration.ONNXRegistry
    decompositions: dict[Any, Callable[..., Any]]


@cache  # a constant of the installed torch
def _translations(opset: int) -> _Translations:
    with quiet():
        registry = _registration.ONNXRegistry.from_torchlib(opset)
    for target, function in (marker_translations() | extra_translations()).items():
        registry._register(
            target,
            _registration.OnnxDecompMeta(
                function, target, signature=None, is_custom=True, skip_signature_inference=True
            ),
        )
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    return _Translations(registry, _decomp.create_onnx_friendly_decomposition_table(known))


def _prepared(exported: ExportedProgram, translations: _Translations) -> ExportedProgram:
    """A copy that is functional, made of known operations as far as possible, and promoted."""
    program = copy.copy(exported)
    program._graph_module = _copied(exported.graph_module)
    _remove_checks(program.graph_module)
    if not _ready(program.graph_module, translations):
        program = exported.run_decompositions(translations.decompositions)
        _remove_checks(program.graph_module)
    _fx_passes.insert_type_promotion_nodes(program.graph_module)
    _drop_constant_outputs(program.graph_module.graph)
    return program


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, twins))
    for old, new in twins.items():
        new.name = old.name  # a copy would rename an input called `input`
    return fx.GraphModule(module, graph)


def _remove_checks(module: fx.GraphModule) -> None:
    _fx_passes.remove_assertion_nodes(module)
    module.graph.eliminate_dead_code()


def _drop_constant_outputs(graph: fx.Graph) -> None:
    """Puts None for numbers and texts that the program returns: the exporter stops at them."""
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(a if isinstance(a, fx.Node) else None for a in output.args[0]),)


def _ready(module: fx.GraphModule, translations: _Translations) -> bool:
    return not any(m is not module for m in module.modules()) and all(
        _known(node, translations) and not is_mutable(node) for node in module.graph.nodes
    )


def _known(node: fx.Node, translations: _Translations) -> bool:
    target = node.target
    if node.op != "call_function" or isinstance(target, str) or target is operator.getitem:
        return True
    onnx_operation = isinstance(target, torch._ops.OpOverload) and target.namespace == "onnx"
    return onnx_operation or translations.registry.is_registered(target)


def _settle_sizes(model: ir.Model) -> None:
    """Turns symbols that export found to be fixed, and that are named "5", into that number."""
    values = [v for node in model.graph.all_nodes() for v in node.outputs]
    for value in [*model.graph.inputs, *values]:
        if value.shape is not None:
            value.shape = ir.Shape([_settled(dim) for dim in value.shape])


def _settled(dim: int | ir.SymbolicDim) -> int | str | None:
    value = dim if isinstance(dim, int) else dim.value
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _sizes_are_sound(exported: ExportedProgram) -> bool:
    """Whether the shapes noted in the graph hold at every size.

    Where a varying size is 1 in the example, torch takes it for a broadcast in some operations:
    ``addmm`` of a batch of 1 notes the shape [1, outputs], though it runs on any batch.
    """
    for node in exported.graph.find_nodes(op="placeholder"):
        for dim in getattr(node.meta.get("val"), "shape", ()):
            if not str(dim).isdecimal() and dim.node.hint in (None, 1):
                return False
    return True


def _forget_shapes(model: ir.Model) -> None:
    outputs = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            rank = len(value.shape) if value.shape is not None and value in outputs else None
            value.shape = None if rank is None else ir.Shape([None] * rank)


def _refuse_mutation(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise LoweringError(
                f"the program changes its buffer {spec.target!r} in every call, and an ONNX model "
                "has no memory. Call eval() first, or make the buffer an input and an output.",
                node=spec.arg.name if hasattr(spec.arg, "name") else None,
            )


def _refuse_unknown(program: ExportedProgram, translations: _Translations) -> None:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if not _known(node, translations):
                    raise _untranslated(node, "has no ONNX translation")


def _failure(program: ExportedProgram, error: ConversionError) -> LoweringError:
    """Names the node that the exporter stopped at."""
    named = re.search(r"translating node %(\w+)", str(error))
    nodes = {n.name: n for n in program.graph_module.graph.nodes}
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if named is None or named[1] not in nodes:
        return LoweringError(f"the program cannot be written as ONNX: {cause}")
    return _untranslated(nodes[named[1]], f"cannot be translated to ONNX ({cause})")


def _untranslated(node: fx.Node, problem: str) -> LoweringError:
    operation = node.meta.get("original_aten", node.target)  # as it was before decomposition
    trace = str(node.meta.get("stack_trace") or "").strip()
    place = f"\nIt comes from:\n{trace}" if trace else ""
    return LoweringError(
        f"operation {operation} (node {node.name}) {problem}. Write this part of the model with "
        f"other operations, or leave it out of the exported model.{place}",
        node=node.name,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about itself off the user's terminal."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
