"""Names and shapes at the boundary of an ONNX model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    SymIntArgument,
    TensorArgument,
)

from fxprune.errors import ConfigError, LoweringError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.export import ExportedProgram

__all__ = ["Signature", "name_boundary"]


@dataclass(frozen=True)
class Signature:
    """Which of the flat inputs and outputs of a program an ONNX model has.

    Attributes:
        inputs: positions of the inputs that are tensors; the others are constants of the program.
        outputs: positions of the outputs that are tensors or sizes.
        constants: what the program returns at the other positions, by position.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: Mapping[int, object]

    @classmethod
    def of(cls, exported: ExportedProgram) -> Signature:
        """Reads the signature of a program.

        Raises:
            LoweringError: an input is neither a tensor nor a constant.
        """
        signature = exported.graph_signature
        given = [s.arg for s in signature.input_specs if s.kind == InputKind.USER_INPUT]
        returned = [s.arg for s in signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
        for argument in given:
            if not isinstance(argument, (TensorArgument, ConstantArgument, SymIntArgument)):
                raise LoweringError(
                    f"input {argument.name!r} is neither a tensor, a whole number nor a constant; "
                    "pass it as a tensor.",
                    node=argument.name,
                )
        return cls(
            _variable(given),
            _variable(returned),
            {i: a.value for i, a in enumerate(returned) if isinstance(a, ConstantArgument)},
        )


def _variable(arguments: Sequence[object]) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(arguments) if not isinstance(a, ConstantArgument))


def name_boundary(
    model: ir.Model,
    input_names: Sequence[str],
    dimension_names: Mapping[str, Mapping[int, str]],
) -> None:
    """Names inputs, outputs and the sizes that vary.

    Inputs get ``input_names``, outputs ``output_0`` and so on. A varying size gets the first name
    that ``dimension_names`` has for it, by input and position, ``input_dimension`` if it has none,
    and in other shapes the expression over these names.

    Raises:
        ConfigError: the names do not fit the inputs.
    """
    graph = model.graph
    _check_names(graph, input_names, dimension_names)
    outputs = [f"output_{i}" for i in range(len(graph.outputs))]
    _make_room({*input_names, *outputs}, graph)
    for value, name in zip(graph.inputs, input_names, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    symbols = _symbol_names(graph, dimension_names)
    for value in graph.inputs:
        given = dimension_names.get(value.name or "", {})
        value.shape = _renamed(value, symbols, given)
    for value in graph.outputs:
        value.shape = _renamed(value, symbols, {})


def _check_names(
    graph: ir.Graph,
    input_names: Sequence[str],
    dimension_names: Mapping[str, Mapping[int, str]],
) -> None:
    if len(input_names) != len(graph.inputs):
        raise ConfigError(
            f"input_names has {len(input_names)} names, but the program has {len(graph.inputs)} "
            "tensor inputs; give one name for each."
        )
    if len(set(input_names)) != len(input_names):
        raise ConfigError(f"input_names {list(input_names)} repeats a name; make them differ.")
    unknown = sorted(set(dimension_names) - set(input_names))
    if unknown:
        raise ConfigError(
            f"dimension_names names {unknown}, which are no inputs; the inputs are "
            f"{list(input_names)}."
        )


def _make_room(names: set[str], graph: ir.Graph) -> None:
    """Renames inner values that hold a name the boundary needs."""
    boundary = {*graph.inputs, *graph.outputs}
    for value in list(graph.initializers.values()):
        if value.name in names and value not in boundary:
            value.name = f"{value.name}_weight"
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}_value"


def _symbol_names(
    graph: ir.Graph, dimension_names: Mapping[str, Mapping[int, str]]
) -> dict[str, str]:
    """Symbol of the program -> name in the file; names that were given come first."""
    symbols: dict[str, str] = {}
    positions = [
        (symbol, value.name, dim)
        for value in graph.inputs
        for dim, symbol in _symbols(value)
        if re.fullmatch(r"\w+", symbol)
    ]
    for symbol, name, dim in positions:
        if dim in dimension_names.get(name or "", {}):
            symbols.setdefault(symbol, dimension_names[name or ""][dim])
    for symbol, name, dim in positions:
        symbols.setdefault(symbol, f"{name}_{dim}")
    return symbols


def _symbols(value: ir.Value) -> list[tuple[int, str]]:
    shape = value.shape or ()
    dims = [(i, d.value) for i, d in enumerate(shape) if isinstance(d, ir.SymbolicDim)]
    return [(i, d) for i, d in dims if d is not None]


def _renamed(
    value: ir.Value, symbols: Mapping[str, str], given: Mapping[int, str]
) -> ir.Shape | None:
    if value.shape is None:
        return None
    dims: list[int | str | None] = []
    for position, dim in enumerate(value.shape):
        if isinstance(dim, int):
            dims.append(dim)
        elif position in given:
            dims.append(symbols.get(str(dim.value), given[position]))
        else:
            dims.append(_expression(dim.value, symbols) or f"{value.name}_{position}")
    return ir.Shape(dims)


def _expression(dim: str | None, symbols: Mapping[str, str]) -> str | None:
    """The size in terms of named sizes; None if it depends on anything else (data)."""
    words = re.findall(r"[A-Za-z_]\w*", dim or "")
    known = all(w in symbols or w in ("Max", "Min") for w in words)
    if dim is None or not known:
        return None
    return re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), dim)
