"""Making an ONNX model small: tied weights once, constants folded, nothing unused, no metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter
from onnxscript.optimizer import FOLDED_FROM_KEY

from fxprune.lowering.markers import DOMAIN
from fxprune.lowering.shortcuts import take_shortcuts

if TYPE_CHECKING:
    from collections.abc import Collection

    from fxprune.lowering.building import Constants

__all__ = ["fold_constants", "share_weights", "simplify", "strip"]

# That rule compares all nodes with all, and what it finds is rare.
_RULES = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"]
_ROUNDS = 4  # in practice two: rewrites open the way for shortcuts once
_SMALL = 64  # bytes; below, a copy costs less than the node that would make it
_NO_LIMIT = 1 << 62


def share_weights(model: ir.Model) -> None:
    """Inlines functions, drops what is unused, and stores equal tensors once."""
    passes.InlinePass()(model)
    passes.RemoveUnusedNodesPass()(model)
    for value in model.graph.initializers.values():
        _make_contiguous(value)
    passes.DeduplicateHashedInitializersPass()(model)


def _make_contiguous(value: ir.Value) -> None:
    """A weight may be a view, such as a transpose; equal tensors are found by their bytes."""
    tensor = value.const_value
    array = None if tensor is None else tensor.numpy()
    if tensor is not None and array is not None and not array.flags.c_contiguous:
        value.const_value = ir.Tensor(array.copy("C"), dtype=tensor.dtype, name=tensor.name)


def fold_constants(model: ir.Model) -> None:
    """Computes what is constant, unless that would make the file bigger."""
    passes.CommonSubexpressionEliminationPass()(model)
    optimizer.fold_constants_ir(
        model,
        onnx_shape_inference=True,
        input_size_limit=_NO_LIMIT,
        output_size_limit=_NO_LIMIT,
        should_fold=_worth_folding,
    )
    passes.RemoveUnusedNodesPass()(model)


def simplify(model: ir.Model, constants: Constants) -> None:
    """Folds and rewrites until nothing gets shorter."""
    for _ in range(_ROUNDS):
        fold_constants(model)
        rewriter.rewrite(model, _RULES)
        passes.IdentityEliminationPass()(model)
        if not take_shortcuts(model, constants):
            break
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.OutputFixPass()(model)


def strip(model: ir.Model, names: Collection[str]) -> None:
    """Takes out metadata.

    Args:
        model: the model.
        names: of the program's tensors. What was computed from one gets its name if that is free.
    """
    _restore_names(model.graph, names)
    passes.ClearMetadataAndDocStringPass()(model)


def _worth_folding(node: ir.Node) -> bool | None:
    """False where the result is bigger than what it replaces, as when a tied weight is copied."""
    if node.domain == DOMAIN:
        return False
    constants = {v for v in node.inputs if v is not None and v.const_value is not None}
    gone = sum(_bytes(v) for v in constants if set(v.consumers()) == {node})
    kept = max((_bytes(v) for v in constants if set(v.consumers()) != {node}), default=0)
    result = _result_bytes(node)
    if result is None:
        result = 4 * (gone + kept)
    # A reduction of a weight (weight normalization) is small, and lets the rest of it fold.
    return None if result - gone <= max(_SMALL, kept // 4) else False


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _result_bytes(node: ir.Node) -> int | None:
    total = 0
    for value in node.outputs:
        if value.shape is None or value.dtype is None or not value.shape.is_static():
            return None
        total += int(value.dtype.itemsize * _product(value.shape))
    return total


def _product(shape: ir.Shape) -> int:
    product = 1
    for dim in shape.numpy():
        product *= dim
    return product


def _restore_names(graph: ir.Graph, names: Collection[str]) -> None:
    taken = {v.name for v in graph.inputs} | set(graph.initializers)
    taken |= {v.name for n in graph.all_nodes() for v in n.outputs}
    for value in list(graph.initializers.values()):
        sources = sorted(value.meta.get(FOLDED_FROM_KEY, ()))
        named = [name for name in sources if name in names and name not in taken]
        if len(named) == 1:
            taken.add(named[0])
            value.name = named[0]
