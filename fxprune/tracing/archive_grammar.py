"""The grammar of size expressions and input guards in a ``.pt2`` archive.

torch gives both to an evaluator of Python: a symbolic size such as
``Add(Symbol('s0', integer=True), Integer(1))`` to ``sympy.sympify``, a guard such as
``L['x'].size()[0] <= 8`` to ``exec``. Here Python's own parser reads them, which evaluates nothing;
every node of the tree must be one that torch itself writes, and the text that torch gets is printed
anew from the checked tree.

Powers and shifts take a small literal as second argument only: ``9**9**9`` is harmless to read and
endless to compute.
"""

from __future__ import annotations

import ast
import functools
import math
import re

__all__ = ["guard_expression", "size_expression"]

_SYMBOL = re.compile(r"(?:s|u|zf|zuf)\d{1,6}")
"""Names of sizes: backed and unbacked integers and floats. The digits are bounded because torch
counts up to the largest one."""

_LONGEST = 20_000
_LARGEST_INT = 2**63
_LARGEST_POWER = 8
_LARGEST_SHIFT = 62

_CONSTANTS = frozenset({"true", "false", "oo"})
_ASSUMPTIONS = frozenset(
    {"integer", "real", "positive", "negative", "nonnegative", "nonpositive", "nonzero", "zero"}
    | {"finite", "even", "odd", "commutative"}
)
_FUNCTIONS = frozenset(
    # sympy's own, as sympy.srepr writes them
    {"Add", "Mul", "Integer", "Rational", "Max", "Min", "Abs", "floor", "ceiling"}
    | {"Eq", "Ne", "Ge", "Gt", "Le", "Lt", "Equality", "Unequality"}
    | {"GreaterThan", "StrictGreaterThan", "LessThan", "StrictLessThan"}
    | {"And", "Or", "Not", "ITE", "Piecewise", "ExprCondPair"}
    # torch.utils._sympy.functions, the ones that its reader knows
    | {"FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilDiv"}
    | {"CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat"}
    | {"FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "Identity"}
)
_POWERS = {
    "Pow": _LARGEST_POWER,
    "PowByNatural": _LARGEST_POWER,
    "FloatPow": _LARGEST_POWER,
    "RoundDecimal": _LARGEST_POWER,
    "LShift": _LARGEST_SHIFT,
    "RShift": _LARGEST_SHIFT,
}
_GUARD_FUNCTIONS = frozenset({"max", "min", "abs", "int", "float"})
_GUARD_QUALIFIED = frozenset(
    {"math.ceil", "math.floor", "math.sqrt", "math.trunc"}
    | {"torch.sym_float", "torch.sym_int", "torch.sym_max", "torch.sym_min"}
)

_BINARY = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)
_UNARY = (ast.UAdd, ast.USub, ast.Not, ast.Invert)
_COMPARE = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


@functools.lru_cache(maxsize=4096)
def size_expression(text: str) -> str:
    """Returns a symbolic size in normal form.

    Raises:
        ValueError: the text is not a size expression that torch writes.
    """
    tree = _parse(text)
    _check(tree, guard=False)
    return ast.unparse(tree)


@functools.lru_cache(maxsize=4096)
def guard_expression(text: str) -> str:
    """Returns a condition on the sizes of the inputs (``L['x'].size()[0]``) in normal form.

    Raises:
        ValueError: the text is not a guard that torch writes.
    """
    tree = _parse(text)
    _check(tree, guard=True)
    return ast.unparse(tree)


def _parse(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise ValueError(f"the expression has {len(text)} characters, at most {_LONGEST} are read")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{_shown(text)} is not an expression") from error


def _check(node: ast.expr, *, guard: bool) -> None:
    match node:
        case ast.Constant(value=value) if _is_number(value):
            return
        case ast.Name(id=name) if not guard and (_SYMBOL.fullmatch(name) or name in _CONSTANTS):
            return
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _UNARY):
            children = [operand]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            _check_power(left, right, _LARGEST_POWER)
            children = [left]
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _BINARY):
            children = [left, right]
        case ast.BoolOp(values=values):
            children = values
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(
            isinstance(op, _COMPARE) for op in ops
        ):
            children = [left, *rest]
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]) if name in _POWERS:
            _check_power(left, right, _POWERS[name])
            children = [left]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS or (
            guard and name in _GUARD_FUNCTIONS
        ):
            children = args
        case ast.Call() if not guard and (_is_symbol(node) or _is_float(node)):
            return
        case ast.Call(func=ast.Attribute() as function, args=args, keywords=[]) if (
            guard and ast.unparse(function) in _GUARD_QUALIFIED
        ):
            children = args
        case _ if guard and _is_input_size(node):
            return
        case _:
            raise ValueError(f"{_shown(ast.unparse(node))} has no place in a size expression")
    for child in children:
        _check(child, guard=guard)


def _is_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= _LARGEST_INT
    return type(value) is bool or (type(value) is float and math.isfinite(value))


def _check_power(base: ast.expr, exponent: ast.expr, largest: int) -> None:
    """Bounds what evaluating a power can cost: a small literal exponent, and no tower."""
    value = _literal(exponent)
    if value is None or abs(value) > largest:
        raise ValueError(
            f"the second argument {_shown(ast.unparse(exponent))} of a power or shift must be "
            f"a number of at most {largest}"
        )
    for node in ast.walk(base):
        if isinstance(node, ast.Pow) or (isinstance(node, ast.Name) and node.id in _POWERS):
            raise ValueError(f"{_shown(ast.unparse(base))} is a power inside a power or shift")


def _literal(node: ast.expr) -> float | None:
    """``3``, ``-3``, ``0.5``, ``Integer(3)``, ``Rational(1, 2)``, ``Float('0.5', ...)``."""
    match node:
        case ast.Constant(value=int(value) | float(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value) | float(value))):
            return -value
        case ast.Call(func=ast.Name(id="Integer"), args=[number], keywords=[]):
            return _literal(number)
        case ast.Call(func=ast.Name(id="Rational"), args=[over, under], keywords=[]):
            numerator, denominator = _literal(over), _literal(under)
            return numerator / denominator if numerator is not None and denominator else None
        case ast.Call(args=[ast.Constant(value=str(digits)), *_]) if _is_float(node):
            return float(digits)
    return None


def _is_symbol(node: ast.Call) -> bool:
    """``Symbol('s0', positive=True, integer=True)``."""
    match node:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return _SYMBOL.fullmatch(name) is not None and all(
                keyword.arg in _ASSUMPTIONS
                and isinstance(keyword.value, ast.Constant)
                and isinstance(keyword.value.value, bool)
                for keyword in node.keywords
            )
    return False


def _is_float(node: ast.Call) -> bool:
    """``Float('0.5', precision=53)``."""
    match node:
        case ast.Call(
            func=ast.Name(id="Float"),
            args=[ast.Constant(value=str(digits))],
            keywords=[ast.keyword(arg="precision", value=ast.Constant(value=53))],
        ):
            return re.fullmatch(r"-?\d{1,40}(?:\.\d{0,40})?(?:e[+-]?\d{1,2})?", digits) is not None
    return False


def _is_input_size(node: ast.expr) -> bool:
    """``L['x']['key'][0]``, ``....size()[1]``, ``....stride()[1]``, ``....storage_offset()``."""
    match node:
        case ast.Subscript(
            value=ast.Call(
                func=ast.Attribute(value=source, attr="size" | "stride"), args=[], keywords=[]
            ),
            slice=ast.Constant(value=int()),
        ):
            return _is_input(source)
        case ast.Call(
            func=ast.Attribute(value=source, attr="storage_offset"), args=[], keywords=[]
        ):
            return _is_input(source)
    return _is_input(node)


def _is_input(node: ast.expr) -> bool:
    match node:
        case ast.Subscript(value=ast.Name(id="L"), slice=ast.Constant(value=str(key))):
            return key.isidentifier()
        case ast.Subscript(value=source, slice=ast.Constant(value=int())):
            return _is_input(source)
        case ast.Subscript(value=source, slice=ast.Constant(value=str(key))):
            return re.fullmatch(r"[\w .:/-]+", key) is not None and _is_input(source)
    return False


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
