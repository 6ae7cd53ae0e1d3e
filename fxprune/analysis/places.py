"""Where an operand stands among the arguments of its operation.

One tensor may stand in two places, as in ``w @ w``, so a place is noted and not looked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Place", "argument_at", "with_argument"]

Place = tuple[int, ...]
"""A position among the arguments; where a list stands there, the position in it too."""


def argument_at(arguments: Any, place: Place) -> Any:
    """What stands in a place.

    Example:
        >>> argument_at(("ij,jk->ik", ["a", "b"]), (1, 0))
        'a'
    """
    for position in place:
        arguments = arguments[position]
    return arguments


def with_argument(arguments: Any, place: Place, value: Any) -> tuple[Any, ...]:
    """The arguments with another value in one place.

    Example:
        >>> with_argument(("ij,jk->ik", ["a", "a"]), (1, 0), "b")
        ('ij,jk->ik', ('b', 'a'))
    """
    first, *inner = place
    if inner:
        value = with_argument(arguments[first], tuple(inner), value)
    return (*arguments[:first], value, *arguments[first + 1 :])
