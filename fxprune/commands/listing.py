"""``fxprune passes``: what there is, told from the passes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from fxprune.errors import ConfigError
from fxprune.policy_text import format_value, nearest
from fxprune.tables import render_table

if TYPE_CHECKING:
    from fxprune.contract import Pass

__all__ = ["describe", "describe_all"]


def describe_all(table: Mapping[str, type[Pass]], chosen: Iterable[str] = ()) -> str:
    """Describes passes with their options.

    Args:
        table: the passes there are, by name.
        chosen: names of those to describe; all if empty.

    Raises:
        ConfigError: there is no pass of that name.
    """
    names = list(chosen) or list(table)
    for name in names:
        if name not in table:
            raise ConfigError(
                f"there is no pass {name!r}; there are {', '.join(table)}.{nearest(name, table)}"
            )
    return "\n\n".join(describe(table[name]) for name in names)


def describe(kind: type[Pass]) -> str:
    """Describes one pass: its name, what it does, its options with kind, default and meaning."""
    docs = _option_docs(kind)
    rows = [
        (f.name, _choices(kind, f.name), _default(f), docs.get(f.name, ""))
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]  # concrete passes are dataclasses
        if f.init
    ]
    summary = (inspect.getdoc(kind) or "").splitlines()[0]
    training = " Needs a task to train on." if kind.needs_task else ""
    head = f"{kind.name}: {summary}{training}"
    return (
        f"{head}\n\n{render_table(('option', 'kind', 'default', 'meaning'), rows)}"
        if rows
        else head
    )


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return format_value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return format_value(field.default_factory())
    return "required"


def _choices(kind: type[Pass], option: str) -> str:
    """The type of an option in words; for a choice, what there is to choose from."""
    return _words(typing.get_type_hints(kind)[option])


def _words(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return ", ".join(format_value(a) for a in arguments)
    if typing.get_origin(hint) is tuple:
        return f"list of {_words(arguments[0])}s"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        given = [_words(a) for a in arguments if a is not type(None)]
        return ", ".join(given + ["none"] * (len(given) < len(arguments)))
    names = {float: "number", int: "integer", str: "text", bool: "true, false"}
    return names.get(hint) or str(getattr(hint, "__name__", hint)).replace("typing.", "")


def _option_docs(kind: type[Pass]) -> dict[str, str]:
    """What the ``Attributes:`` section of the docstring says of each option, on one line."""
    lines = (inspect.getdoc(kind) or "").splitlines()
    if "Attributes:" not in lines:
        return {}
    docs: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Attributes:") + 1 :]:
        if line and not line.startswith(" "):
            break
        entry = re.fullmatch(r" {4}(\w+): (.*)", line)
        if entry:
            name, docs[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return docs
