"""In-place operations of an exported program, made pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxprune.operations import is_mutable

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["functionalize"]

aten = torch.ops.aten


@torch.library.custom_op("fxprune::held_dropout", mutates_args=())
def _held_dropout(x: Tensor, p: float, kind: str) -> Tensor:
    """Stands for an evaluation-mode dropout while torch functionalizes, which would drop it."""
    return x.clone()


@_held_dropout.register_fake
def _(x: Tensor, p: float, kind: str) -> Tensor:
    return torch.empty_like(x)


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """An equal exported program without in-place operations; itself if it has none.

    Composite operations stay whole, dropout and batch norm stay recognisable.
    """
    if not any(is_mutable(n) for n in exported.graph.nodes):
        return exported
    for node in exported.graph.nodes:
        name = str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
        if name in ("dropout", "feature_dropout", "alpha_dropout") and not node.args[2]:
            # An in-place dropout in eval mode returns its input, which the pure one does too.
            node.args = (node.args[0], node.args[1], name)
            node.target = torch.ops.fxprune.held_dropout.default
    exported = exported.run_decompositions({})
    for node in list(exported.graph.nodes):
        if node.target is torch.ops.fxprune.held_dropout.default:
            x, p, name = node.args
            node.target, node.args = getattr(aten, name).default, (x, p, False)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _restore_batch_norm(exported.graph, node)
    return exported


def _restore_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, mean, var, momentum, eps = node.args
    with graph.inserting_before(node):
        whole = graph.call_function(
            aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)
        )
    whole.meta = {**node.meta, "val": node.meta["val"][0]}
    for item in list(node.users):
        if item.args[1] == 0:
            item.replace_all_uses_with(whole)
        graph.erase_node(item)
    graph.erase_node(node)
