"""A traced model: the graph, its tensors and its calling convention.

A program is immutable. Its graph has one ``get_attr`` node per tensor, calls ATen operations and
the operations of :mod:`fxprune.tracing.recurrent`, and holds evaluation-mode calls of dropout and
batch norm; :meth:`Program.module` turns it into a module that trains, evaluates and switches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from enum import Enum
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export._unlift import _get_codegen
from torch.utils import _pytree as pytree

from fxprune.errors import InputError
from fxprune.masking.masks import Masks
from fxprune.switching import insert_refusal, make_switchable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fxprune.calls import Call

__all__ = ["InputSpec", "Kind", "Program", "Refusal", "check_input", "free_name"]

aten = torch.ops.aten


class Kind(Enum):
    """What a tensor of a program is to the user's module."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something was left as it is.

    Attributes:
        node: the graph node, input dimension or tensor concerned.
        reason: what stands in the way, in words.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class InputSpec:
    """One leaf of the model's inputs.

    Attributes:
        name: the forward parameter it came in by.
        shape: sizes; a string is a dynamic dimension's symbol. None if it is not a tensor.
    """

    name: str
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        sizes = ", ".join("any" if isinstance(s, str) else str(s) for s in self.shape or ())
        return f"{self.name} [{sizes}]" if self.shape is not None else self.name


@dataclass(frozen=True)
class Program:
    """A traced model.

    Attributes:
        graph: the FX graph; placeholders are the user's inputs only.
        tensors: parameters, buffers and constants by qualified name, shared with the user's model.
        kinds: what each tensor is.
        aliases: further names of tied tensors, each mapped to the name in ``tensors``.
        inputs: one entry per placeholder.
        in_spec: structure of ``(args, kwargs)``.
        out_spec: structure of the result.
        example: a call that fits, tensors cloned from the user's.
        refusals: what tracing had to leave fixed, and why.
        switches: names of the dropout, batch norm and attention nodes that follow ``train()`` and
            ``eval()``, each with its flag or probability in train mode.
        masks: what is pruned; the graph and tensors stay whole until it is shrunk.
        states: whether recurrent states at the boundary keep their size when units go.
        mode_difference: None if train and eval mode differ in those only, else where they do.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    kinds: Mapping[str, Kind]
    aliases: Mapping[str, str]
    inputs: tuple[InputSpec, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example: Call
    refusals: tuple[Refusal, ...] = ()
    switches: Mapping[str, float] = field(default_factory=dict)
    mode_difference: str | None = None
    masks: Masks = field(default_factory=Masks)
    states: Literal["keep", "shrink"] = "keep"

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self.inputs))
        operations = sum(n.op == "call_function" for n in self.graph.nodes)
        numbers = sum(t.numel() for n, t in self.tensors.items() if self.kinds[n] is Kind.PARAMETER)
        return f"Program({inputs}; operations: {operations}, parameters: {numbers:,})"

    def nodes(self, target: Any) -> list[fx.Node]:
        """The calls of one operation, in execution order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target is target]

    def copy_graph(self) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """A copy of the graph to work on, and the map from each node to its copy."""
        graph = fx.Graph()
        twins: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, twins)
        output = self.graph.output_node()
        twins[output] = graph.output(fx.map_arg(output.args[0], twins.__getitem__))
        for old, new in twins.items():
            if new.name != old.name:
                new.name = old.name
        return graph, twins

    def with_graph(self, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> Program:
        """This program with another graph and its tensors."""
        used = {n.target for n in graph.nodes if n.op == "get_attr"}
        return replace(
            self,
            graph=graph,
            tensors={k: v for k, v in tensors.items() if k in used or k in self.tensors},
        )

    def module(self, parts: Mapping[str, nn.Module] | None = None) -> fx.GraphModule:
        """A module that runs the program, over the program's own tensors.

        It takes and returns what the user's model does, switches dropout and batch norm with
        ``train()`` and ``eval()``, and checks the sizes that tracing fixed.

        Args:
            parts: the modules that the graph calls, by name, such as gates.
        """
        graph, _ = self.copy_graph()
        root: dict[str, Any] = {**self.tensors, **(parts or {})}
        for node in list(graph.nodes):
            if node.name in self.switches:
                root.update(make_switchable(graph, node, self.switches[node.name], self.tensors))
        _insert_input_checks(graph, self)
        if self.mode_difference is not None:
            root.update(insert_refusal(graph, self.mode_difference))
        for node in graph.nodes:
            # Unpickling traces the generated code: functions of ours stay one node each there.
            if node.op == "call_function" and isinstance(node.target, FunctionType):
                node.meta["is_wrapped"] = True
        graph.set_codegen(_get_codegen(self.in_spec, self.out_spec, _argument_names(self)))
        module = fx.GraphModule(root, graph, class_name="Program")
        for alias, name in self.aliases.items():
            if _has(module, name):
                _attach(module, alias, module.get_parameter(name))
        return module.eval()


def free_name(stem: str, taken: Collection[str]) -> str:
    """A name for a tensor that is added to a program: ``_stem_8``, or the next that is free.

    Example:
        >>> free_name("mask", {"weight": 0, "_mask_2": 1})
        '_mask_3'
    """
    names = (f"_{stem}_{number}" for number in itertools.count(len(taken)))
    return next(name for name in names if name not in taken)


def check_input(x: Tensor, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """Returns ``x`` if its fixed sizes are those the program was traced with.

    Raises:
        InputError: a size differs; the message names the input and what it expects.
    """
    if not isinstance(x, Tensor):
        raise InputError(
            f"input {name!r} is {type(x).__name__}, but the program was traced with a tensor. Give "
            "it one, or trace again without."
        )
    if x.dim() != len(shape) or any(
        s is not None and have != s for s, have in zip(shape, x.shape, strict=True)
    ):
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise InputError(
            f"input {name!r} has shape {tuple(x.shape)}, but the program was traced for "
            f"[{expected}]. Give it that shape, or trace again with an example of the new one."
        )
    return x


def check_constant(value: Any, name: str, traced: Any) -> None:
    """Refuses another value than the one that is part of the program.

    Raises:
        InputError: an input that is no tensor is not what it was when the program was traced.
    """
    if isinstance(value, Tensor) or (value is not traced and value != traced):
        given = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"input {name!r} is {given}, but the program was traced with {traced!r}, which is part "
            "of it. Give it that value, or trace again with the other one."
        )


def _insert_input_checks(graph: fx.Graph, program: Program) -> None:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    values = pytree.tree_leaves(program.example)
    for node, spec, value in zip(placeholders, program.inputs, values, strict=True):
        if spec.shape is None:
            if value is None or isinstance(value, (bool, int, float, str)):
                with graph.inserting_after(placeholders[-1]):
                    graph.call_function(check_constant, (node, spec.name, value))
            continue
        if not node.users:
            continue
        fixed = tuple(s if isinstance(s, int) else None for s in spec.shape)
        with graph.inserting_after(placeholders[-1]):
            checked = graph.call_function(check_input, (node, spec.name, fixed))
        checked.meta = dict(node.meta)
        node.replace_all_uses_with(
            checked, delete_user_cb=lambda user, own=checked: user is not own
        )


def _argument_names(program: Program) -> list[str] | None:
    """Names of forward's parameters; None if they cannot all be told."""
    args_spec, kwargs_spec = program.in_spec.child(0), program.in_spec.child(1)
    names = [f"arg_{i}" for i in range(args_spec.num_children)]
    leaves, _ = pytree.tree_flatten_with_path(program.example)
    for (path, _), spec in reversed(list(zip(leaves, program.inputs, strict=True))):
        if path[0].idx == 0:
            # The first leaf of an argument is named after it and its own place in it.
            keys = [str(getattr(k, "key", getattr(k, "idx", ""))) for k in path[2:]]
            names[path[1].idx] = spec.name.removesuffix("".join(f"_{k}" for k in keys))
    names += kwargs_spec.context
    return names if all(n.isidentifier() for n in names) and len(set(names)) == len(names) else None


def _has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_parameters())


def _attach(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(leaf, parameter)
