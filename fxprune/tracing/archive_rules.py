"""What each kind of text in a ``.pt2`` archive may be.

A rule returns the text if it may pass, in normal form where it has one, and raises ValueError if
not. Rules are strict where torch makes code of a text: names, quoted values, operators, trees.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from typing import Any

import torch

from fxprune.tracing.archive_grammar import size_expression

__all__ = [
    "DEVICES",
    "DIALECTS",
    "Rule",
    "argument_name",
    "identifier",
    "inert",
    "input_tree",
    "is_inert",
    "load_json",
    "module_stack",
    "one_of",
    "operator",
    "payload",
    "qualified",
    "ranged_size",
    "readable",
    "tree",
]

Rule = Callable[[str], str]

DEVICES = frozenset({"cpu", "cuda", "meta", "mps", "xpu"})
DIALECTS = frozenset({"", "ATEN", "TRAINING"})
_ATEN = re.compile(r"torch\.ops\.(aten|prims|fxprune)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_UNSAFE_ATEN = re.compile(
    # write or map files
    r"save|from_file"
    # change the process, not a tensor
    r"|set_grad_enabled|set_data|_cufft_\w+|_print|warn"
    # build tensors from unchecked parts: they could reach beyond their memory
    r"|_?sparse_\w*tensor\w*|_nested_\w+|_reshape_alias|set_"
)
_ARITHMETIC = frozenset(
    f"_operator.{name}"
    for name in "add and_ eq floordiv ge gt le lshift lt mod mul ne neg or_ pos pow rshift sub "
    "truediv".split()
) | frozenset(
    "math.trunc torch._sym_sqrt torch.sym_float torch.sym_int torch.sym_ite torch.sym_max "
    "torch.sym_min torch.sym_not".split()
)
"""Functions of sizes that torch's reader knows, by the names that its writer gives them."""


def load_json(data: bytes) -> Any:
    """Parses UTF-8 JSON.

    Raises:
        ValueError: not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON text ({error})") from error


def readable(text: str) -> str:
    """Texts shown to people: anything, less what would drive a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def module_stack(text: str) -> str:
    """Names of modules that a node came from; torch may quote the parts to unflatten a program."""
    if not text.isprintable() or set(text) & set('"\\`'):
        raise ValueError(f"{text!r:.60} has double quotes, backslashes or control characters")
    return text


def is_inert(text: str) -> bool:
    """Whether a text cannot end the quotes that it is pasted between."""
    return text.isprintable() and not set(text) & set("'\"\\`")


def inert(text: str) -> str:
    """Texts that torch pastes between quotes into generated code."""
    if not is_inert(text):
        raise ValueError(f"{text!r:.60} has quotes, backslashes or control characters")
    return text


def identifier(text: str) -> str:
    """Names that become variables of generated code."""
    if not text.isidentifier() or keyword.iskeyword(text):
        raise ValueError(f"{text!r:.60} is not a name")
    return text


def argument_name(text: str) -> str:
    """Parameters of an operator's schema, which may be keywords such as ``from``."""
    return text if not text or keyword.iskeyword(text) else identifier(text)


def qualified(text: str) -> str:
    """Dotted names of parameters and modules; torch quotes the parts that are not names."""
    parts = text.split(".") if text else []
    for part in parts:
        if not re.fullmatch(r"[\w@$:/ +-]+", part) or part.startswith("__"):
            raise ValueError(f"{text!r:.60} is not a dotted name")
    return text


def ranged_size(text: str) -> str:
    """Sizes with a range: looked up as they are written, so not in normal form."""
    size_expression(text)
    return text


def payload(text: str) -> str:
    """Members that hold the bytes of a tensor."""
    if not re.fullmatch(r"(?:weight|tensor)_\d{1,9}", text):
        raise ValueError(f"{text!r:.60} is not the name of a stored tensor")
    return text


def operator(text: str) -> str:
    """Operators of the accepted namespaces that this process knows, and arithmetic on sizes."""
    if text in _ARITHMETIC:
        return text
    match = _ATEN.fullmatch(text)
    if match is None or _UNSAFE_ATEN.fullmatch(match[2]):
        raise ValueError(
            f"operator {text!r:.80} is not accepted: only tensor operations of aten, prims and "
            "fxprune are, no control flow, custom operators or kernels"
        )
    namespace = getattr(torch.ops, match[1])
    operator = getattr(getattr(namespace, match[2], None), match[3], None)
    if not isinstance(operator, torch._ops.OpOverload):
        raise ValueError(f"operator {text!r:.80} is not registered in this version of the library")
    return text


def one_of(accepted: frozenset[str]) -> Rule:
    """Texts of a fixed list."""

    def rule(text: str) -> str:
        if text not in accepted:
            raise ValueError(f"{text!r:.60} is not one of {sorted(accepted)}")
        return text

    return rule


def tree(text: str) -> str:
    """The structure of inputs or outputs: tuples, lists and dictionaries only."""
    described = load_json(text.encode())
    if type(described) is not list or len(described) != 2 or described[0] != 1:
        raise ValueError(f"{text!r:.60} is not a tree description of version 1")
    _check_tree(described[1])
    return json.dumps(described)


def input_tree(text: str) -> str:
    """``(args, kwargs)``: the keywords become variables of generated code."""
    described = tree(text)
    children = json.loads(described)[1]["children_spec"]
    if [child["type"] for child in children] != ["builtins.tuple", "builtins.dict"]:
        raise ValueError(f"{text!r:.60} does not describe positional and keyword arguments")
    for name in json.loads(children[1]["context"]):
        identifier(str(name))
    return described


def _check_tree(node: Any) -> None:
    if type(node) is not dict or node.keys() != {"type", "context", "children_spec"}:
        raise ValueError("a tree description has an unknown form")
    kind, context, children = node["type"], node["context"], node["children_spec"]
    if type(children) is not list:
        raise ValueError("a tree description has an unknown form")
    if kind is None:
        accepted = context is None and not children
    elif kind in ("builtins.tuple", "builtins.list"):
        accepted = context == "null"
    elif kind in ("builtins.dict", "collections.OrderedDict") and type(context) is str:
        keys = load_json(context.encode())
        accepted = type(keys) is list and len(keys) == len(children)
        for key in keys if accepted else []:
            accepted &= type(key) is int or (type(key) is str and is_inert(key))
    else:
        raise ValueError(
            f"inputs or outputs of type {kind!r:.60} are not accepted; "
            "use tuples, lists and dictionaries"
        )
    if not accepted:
        raise ValueError(f"a tree description of type {kind} has an unknown form")
    for child in children:
        _check_tree(child)
