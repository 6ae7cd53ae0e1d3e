"""What a node of a graph calls: the name of the operation, and its arguments by name."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import fx

__all__ = ["argument", "dims_of", "is_mutable", "operation_name"]


def operation_name(node: fx.Node) -> str:
    """The operation without namespace and overload: ``linear``, ``lstm``, ``getitem``."""
    return _name_of(node.target)


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operation by its name: its default if not given, None if there is none."""
    for position, (known, default) in enumerate(_arguments_of(node.target)):
        if known == name:
            given = node.args[position : position + 1]
            return given[0] if given else node.kwargs.get(name, default)
    return None


def dims_of(given: Any, rank: int) -> set[int]:
    """The dimensions that an argument names: one, several, or all if none."""
    if given is None:
        return set(range(rank))
    named = given if isinstance(given, (list, tuple)) else (given,)
    return {int(d) % rank for d in named} or set(range(rank))


def is_mutable(node: fx.Node) -> bool:
    """Whether an operation changes an argument in place."""
    schema: Any = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


@lru_cache(maxsize=1024)
def _arguments_of(target: Any) -> tuple[tuple[str, Any], ...]:
    """Names and defaults; of a function of Python, as the layers of a loaded archive are, too."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return tuple((known.name, known.default_value) for known in schema.arguments)
    parameters = inspect.signature(target).parameters.values()
    return tuple((p.name, None if p.default is p.empty else p.default) for p in parameters)


@lru_cache(maxsize=1024)
def _name_of(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1]
    return str(getattr(target, "__name__", target))
