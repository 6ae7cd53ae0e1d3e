"""Reads the JSON of a ``.pt2`` archive into torch's schema, checking every string by its purpose.

torch's own reader takes any JSON value for any field, and much of it ends where code is made: names
become variables in generated Python, targets are looked up attribute by attribute from ``torch``
on, tree descriptions import modules, texts are pasted into guards. Here each value must have the
type that the schema declares and each string must pass the one rule written for its field. A field
without a rule is refused, so a field that a later torch adds is refused until somebody judges it.

Higher-order operators, custom classes, effect tokens and Triton kernels have no rule on purpose.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final, TypeVar

from torch._export.serde import schema
from torch._export.serde.union import _Union

from fxprune.tracing.archive_grammar import guard_expression, size_expression
from fxprune.tracing.archive_rules import (
    DEVICES,
    DIALECTS,
    Rule,
    argument_name,
    identifier,
    inert,
    input_tree,
    module_stack,
    one_of,
    operator,
    payload,
    qualified,
    ranged_size,
    readable,
    tree,
)

__all__ = ["decode"]

T = TypeVar("T")

_LARGEST_INT = 2**63
_METADATA = {"nn_module_stack": module_stack, "stack_trace": readable, "torch_fn": readable}
"""What is kept of a node's metadata: plain texts. The rest is looked up in modules by name."""


def decode(kind: type[T], value: object) -> T:
    """Returns a JSON value as an instance of one of torch's schema classes.

    Unknown keys are left out, as torch does.

    Raises:
        ValueError: a value of the wrong type, a string that its rule refuses, or a part of the
            format that is not accepted; names the place.
    """
    return typing.cast(T, _decode(kind, value, "", None, _RULES))


def _decode(kind: Any, value: Any, where: str, rule: Rule | None, rules: Mapping[str, Rule]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _decode(arguments[0], value, where, rule, rules)
    if origin is list and type(value) is list:
        return [
            _decode(arguments[0], item, f"{where}[{index}]", rule, rules)
            for index, item in enumerate(value)
        ]
    if origin is dict and type(value) is dict:
        return {
            _text(key, where, rule): _decode(arguments[1], item, f"{where}.{key:.40}", rule, rules)
            for key, item in value.items()
        }
    if isinstance(kind, type) and type(value) is dict and dataclasses.is_dataclass(kind):
        if kind is schema.Node:
            rules = _NODE_RULES
        if issubclass(kind, _Union):
            return _decode_union(kind, value, where, rules)
        return _decode_fields(kind, value, where, rules)
    return _decode_scalar(kind, value, where, rule)


def _decode_fields(kind: Any, value: dict[str, Any], where: str, rules: Mapping[str, Rule]) -> Any:
    decoded: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        inside = f"{where}.{field.name}".lstrip(".")
        if field.name not in value:
            if field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{inside} is missing")
        elif field.name == "metadata":
            decoded["metadata"] = _metadata(value["metadata"], inside)
        else:
            rule = rules.get(f"{kind.__name__}.{field.name}")
            hint = _hints(kind)[field.name]
            decoded[field.name] = _decode(hint, value[field.name], inside, rule, rules)
    return kind(**decoded)


def _decode_union(kind: Any, value: dict[str, Any], where: str, rules: Mapping[str, Rule]) -> Any:
    tag = next(iter(value), "")
    if len(value) != 1 or tag not in _hints(kind):
        raise ValueError(f"{where} is not one of the forms of {kind.__name__}")
    rule = rules.get(f"{kind.__name__}.{tag}")
    inside = _decode(_hints(kind)[tag], value[tag], f"{where}.{tag}", rule, rules)
    return kind.create(**{tag: inside})


def _decode_scalar(kind: Any, value: Any, where: str, rule: Rule | None) -> Any:
    if kind is str and type(value) is str:
        return _text(value, where, rule)
    if kind is int and type(value) is int and abs(value) <= _LARGEST_INT:
        return value
    if kind is bool and type(value) is bool:
        return value
    if kind is float and (type(value) in (int, float) or value in ("Infinity", "-Infinity", "NaN")):
        return float(value)
    if isinstance(kind, type) and issubclass(kind, IntEnum) and type(value) is int:
        return kind(value)
    raise ValueError(f"{where} should be {getattr(kind, '__name__', kind)}, got {value!r:.60}")


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind, globalns=vars(schema))


def _text(text: str, where: str, rule: Rule | None) -> str:
    if rule is None:
        raise ValueError(f"{where}: {text!r:.60} is a part of the format that is not accepted")
    try:
        return rule(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} should be a dictionary")
    return {
        key: _decode(str, value[key], f"{where}.{key}", rule, _RULES)
        for key, rule in _METADATA.items()
        if key in value
    }


_RULES: Final[Mapping[str, Rule]] = {
    "Argument.as_string": inert,
    "Argument.as_strings": inert,
    "BufferMutationSpec.buffer_name": qualified,
    "ConstantValue.as_string": inert,
    "Device.type": one_of(DEVICES),
    "ExportedProgram.guards_code": guard_expression,
    "ExportedProgram.opset_version": inert,
    "ExportedProgram.range_constraints": ranged_size,
    "ExportedProgram.torch_version": inert,
    "ExportedProgram.verifiers": one_of(DIALECTS),
    "GradientToParameterSpec.parameter_name": qualified,
    "GradientToUserInputSpec.user_input_name": identifier,
    "Graph.sym_bool_values": identifier,
    "Graph.sym_float_values": identifier,
    "Graph.sym_int_values": identifier,
    "Graph.tensor_values": identifier,
    "InputToBufferSpec.buffer_name": qualified,
    "InputToConstantInputSpec.name": identifier,
    "InputToParameterSpec.parameter_name": qualified,
    "InputToTensorConstantSpec.tensor_constant_name": qualified,
    "ModuleCallEntry.fqn": qualified,
    "ModuleCallSignature.forward_arg_names": identifier,
    "ModuleCallSignature.in_spec": input_tree,
    "ModuleCallSignature.out_spec": tree,
    "NamedArgument.name": argument_name,
    "Node.name": identifier,
    "Node.target": operator,
    "ParameterMutationSpec.parameter_name": qualified,
    "PayloadConfig.config": qualified,
    "PayloadMeta.path_name": payload,
    "SymBoolArgument.as_name": identifier,
    "SymExpr.expr_str": size_expression,
    "SymFloatArgument.as_name": identifier,
    "SymIntArgument.as_name": identifier,
    "TensorArgument.name": identifier,
    "UserInputMutationSpec.user_input_name": identifier,
}
"""What each string of the schema must be. Of a dictionary, the rule is for the keys."""

_NODE_RULES: Final[Mapping[str, Rule]] = {
    **_RULES,
    # Arguments of operators are written as Python literals, so quotes are harmless: messages of
    # run-time assertions have them.
    "Argument.as_string": readable,
    "Argument.as_strings": readable,
}
