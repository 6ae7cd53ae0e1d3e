"""An exported program as a :class:`~fxprune.program.Program`.

Parameters become ``get_attr`` nodes under the user's names, markers become calls of the
functions in :mod:`fxprune.tracing.recurrent`, in-place operations become pure ones, and what only
``torch.export`` needs (assertions, guards) is dropped.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from fxprune.errors import TraceError, UnsupportedOpError
from fxprune.program import InputSpec, Kind, Program
from fxprune.tracing import packing, recurrent, states
from fxprune.tracing.functional import functionalize
from fxprune.tracing.simplify import simplify

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from fxprune.calls import Call

__all__ = ["import_program", "place_of", "size_of"]

aten = torch.ops.aten

_FUNCTIONS: dict[Any, Any] = {
    torch.ops.fxprune.lstm.default: recurrent.lstm,
    torch.ops.fxprune.gru.default: recurrent.gru,
    torch.ops.fxprune.rnn.default: recurrent.rnn,
    torch.ops.fxprune.pad_packed.default: packing.pad_packed,
    torch.ops.fxprune.enter_state.default: states.enter_state,
    torch.ops.fxprune.leave_state.default: states.leave_state,
}

_CHECKS = {
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
    aten._assert_async.msg,
}

_KINDS = {
    InputKind.PARAMETER: Kind.PARAMETER,
    InputKind.BUFFER: Kind.BUFFER,
    InputKind.CONSTANT_TENSOR: Kind.CONSTANT,
}


def import_program(exported: ExportedProgram, example: Call) -> Program:
    """Turns an exported program into a program.

    Args:
        exported: the result of ``torch.export`` in eval mode.
        example: the call it was exported with.

    Raises:
        TraceError: it updates buffers or inputs, returns something that is no tensor, or holds
            operations that cannot be analysed.
    """
    exported = functionalize(exported)
    _refuse_mutation(exported)
    signature = exported.graph_signature
    values = {**exported.state_dict, **exported.constants}
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, Kind] = {}
    aliases: dict[str, str] = {}
    canonical: dict[int, str] = {}
    for name in [*exported.state_dict, *exported.constants]:
        value = values[name]
        if isinstance(value, Tensor):
            first = canonical.setdefault(id(value), name)
            if first != name:
                aliases[name] = first
            else:
                tensors[name] = value
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    specs = {s.arg.name: s for s in signature.input_specs}
    inputs: list[InputSpec] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                twins[node] = graph.node_copy(node)
                inputs.append(InputSpec(node.name, _shape(node)))
                continue
            if spec.kind not in _KINDS or spec.target is None:
                raise TraceError(
                    f"the model holds {spec.target or node.name!r}, a {spec.kind.name.lower()}; "
                    "only tensors can be part of a program. Make it an attribute read outside "
                    "forward, or pass it in as an input."
                )
            name = aliases.get(spec.target, spec.target)
            kinds[name] = (
                Kind.PARAMETER
                if isinstance(values[name], torch.nn.Parameter)
                else _KINDS[spec.kind]
            )
            twins[node] = _get_attr(graph, twins, node, name)
        elif node.op == "output":
            outputs = _outputs(exported, node)
            graph.output(fx.map_arg(outputs, twins.__getitem__))
        else:
            twins[node] = _import_node(graph, twins, node)
    kinds.update({n: Kind.BUFFER for n in tensors if n not in kinds})
    for name, value in tensors.items():
        if isinstance(value, torch.nn.Parameter):
            kinds[name] = Kind.PARAMETER
    _drop_checks(graph)
    program = Program(
        graph=graph,
        tensors=tensors,
        kinds=kinds,
        aliases=aliases,
        inputs=tuple(inputs),
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        example=example,
    )
    simplify(program.graph)
    return program


def place_of(node: fx.Node) -> str:
    """Where in the user's code a node comes from, as ``", at file:line (code)"``; may be empty."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    lines = [line.strip() for line in str(trace).strip().splitlines()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not files:
        return ""
    # The innermost line that is the user's, where there is one.
    own = [i for i in files if "/torch/" not in lines[i] and not lines[i].startswith('File "<')]
    found = (own or files)[-1]
    where = lines[found].replace('File "', "").replace('", line ', ":").split(",")[0]
    code = lines[found + 1] if found + 1 < len(lines) else ""
    return f", at {where} ({code})"


def _place_near(node: fx.Node) -> str:
    """Where a node, or else the next one of which that is known, comes from."""
    while not place_of(node) and node.op != "output":
        node = node.next
    return place_of(node)


def _shape(node: fx.Node) -> tuple[int | str, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return tuple(size_of(s) for s in value.shape)


def size_of(size: int | torch.SymInt) -> int | str:
    """A size as a number, or as an expression in symbols where it may vary."""
    text = str(size)
    return int(text) if text.isdigit() else text


def _get_attr(graph: fx.Graph, twins: dict[fx.Node, fx.Node], node: fx.Node, name: str) -> fx.Node:
    for twin in twins.values():
        if twin.op == "get_attr" and twin.target == name:
            return twin
    twin = graph.create_node("get_attr", name, name=node.name)
    twin.meta = dict(node.meta)
    return twin


def _import_node(graph: fx.Graph, twins: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        if node.op == "get_attr":  # the part of the graph, which stands before what runs it
            node = next(iter(node.users), node)
        raise UnsupportedOpError(
            f"the model uses {node.target}{place_of(node)}, which runs a part of the graph of its "
            "own. Write it without (a plain loop instead of a higher-order operation; no_grad "
            "around the call instead of inside forward).",
            node=node.name,
            target=str(node.target),
        )
    if getattr(node.target, "__module__", "").startswith("torch._functorch"):
        raise UnsupportedOpError(
            f"the model uses torch.vmap or another transform of torch.func{_place_near(node)}, "
            "whose steps only torch can follow. Write it without (a batch dimension of your own "
            "instead of vmap).",
            node=node.name,
            target=node.name,
        )
    twin = graph.node_copy(node, twins.__getitem__)
    twin.target = _FUNCTIONS.get(node.target, node.target)
    twin.meta.pop("is_wrapped", None)  # the code that comes of it would break later traces
    return twin


def _refuse_mutation(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise TraceError(
                f"forward updates the buffer {spec.target!r} in eval mode. A program has no memory "
                "of earlier calls: pass the state in as an input and return the new one."
            )
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise TraceError(
                f"forward changes its input {spec.target!r} in place; work on a copy: x.clone()."
            )


def _outputs(exported: ExportedProgram, node: fx.Node) -> tuple[Any, ...]:
    results: tuple[Any, ...] = node.args[0]  # type: ignore[assignment]
    kinds = [s.kind for s in exported.graph_signature.output_specs]
    users = tuple(r for r, k in zip(results, kinds, strict=True) if k is OutputKind.USER_OUTPUT)
    for index, result in enumerate(users):
        tensor = isinstance(result, fx.Node) and isinstance(result.meta.get("val"), Tensor)
        if result is not None and not tensor:
            raise TraceError(
                f"output {index} of the model is {result!r}, not a tensor. Return tensors, or "
                "tuples, lists and dicts of them, or None."
            )
    return users


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        check = node.target in _CHECKS
        unused = not node.users and node.op not in ("placeholder", "output")
        if check or (unused and (node.op == "get_attr" or _pure(node))):
            graph.erase_node(node)


def _pure(node: fx.Node) -> bool:
    return node.target is operator.getitem or not node.is_impure()
