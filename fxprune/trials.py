"""Calls on which two forms of a program are compared: other sizes, and other values.

An example of zeros, or one that leaves units of a ReLU silent, would hide what is wrong behind
them. So all calls but the example itself have noise added to their floating inputs, where the
program makes numbers of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.errors import FxpruneError
from fxprune.naming import symbol_names
from fxprune.tracing.sizes import at_sizes, candidate_sizes, example_sizes, size_label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fxprune.calls import Call
    from fxprune.program import Program

__all__ = ["REJECTIONS", "Trial", "few_steps", "first_taken", "other_values", "trials"]

REJECTIONS = (FxpruneError, RuntimeError, ValueError, IndexError, TypeError)
"""What a program raises on a call that it does not take."""


@dataclass(frozen=True)
class Trial:
    """A call and what comes of it.

    Attributes:
        label: "example", sizes such as "batch=3, time=7", or "other values".
        call: the inputs.
        expected: the outputs of the reference.
    """

    label: str
    call: Call
    expected: Any


def trials(program: Program, reference: Callable[[Call], Any], most: int = 5) -> Iterator[Trial]:
    """The example, then as many calls as are wanted of those that the reference takes.

    Args:
        program: whose example and dimensions are used.
        reference: computes the outputs of a call.
        most: how many, the example included.

    Raises:
        Exception: what the reference raises on the example.
    """
    yield Trial("example", program.example, reference(program.example))
    for label, attempts in _other_calls(program):
        if most <= 1:
            return
        taken = first_taken(attempts, reference)
        if taken is not None:
            yield Trial(label, *taken)
            most -= 1


def _other_calls(program: Program) -> Iterator[tuple[str, list[Call]]]:
    """Calls of other sizes, each with other values if it may be and as it is; the example last."""
    names = symbol_names(program)
    for sizes in candidate_sizes(example_sizes(program)):
        call = at_sizes(program, sizes)
        yield size_label(sizes, names), [other_values(call), call]
    if any(_is_floating(leaf) for leaf in pytree.tree_leaves(program.example)):
        yield "other values", [other_values(program.example)]


_FEW = 8


def few_steps(
    program: Program, reference: Callable[[Call], Any], call: Call
) -> tuple[Call, Any] | None:
    """A call cut to at most 8 steps, and 8 of all else that varies, and its outputs.

    Over more of them rounding is all there is in the outputs of a chaotic recurrence. None if the
    reference does not take so few.
    """
    leaves = pytree.tree_leaves(call)
    sizes = {
        symbol: min(leaf.shape[dim], _FEW)
        for leaf, spec in zip(leaves, program.inputs, strict=True)
        for dim, symbol in enumerate(spec.shape or ())
        if isinstance(symbol, str) and symbol.isidentifier()
    }
    return first_taken([at_sizes(program, sizes, call)], reference)


def first_taken(
    attempts: Sequence[Call], reference: Callable[[Call], Any]
) -> tuple[Call, Any] | None:
    """The first call that the reference takes, and its outputs; None if there is none.

    Where only a later call gives numbers, it is that one: noise may make a logarithm undefined.
    """
    taken = None
    for call in attempts:
        try:
            outputs = reference(call)
        except REJECTIONS:
            continue
        taken = call, outputs
        if not _holds_nan(outputs):
            break
    return taken


def _holds_nan(outputs: Any) -> bool:
    return any(bool(t.isnan().any()) for t in pytree.tree_leaves(outputs) if _is_floating(t))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def other_values(call: Call) -> Call:
    """The call with normal noise on its floating tensors, of their deviation or, if constant, 1."""
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not _is_floating(x) or not x.numel():
            return x
        deviation = x.double().std(correction=0)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        scale = deviation if deviation > 0 and deviation.isfinite() else deviation.new_ones(())
        return (x.double() + scale * noise.to(x.device)).to(x.dtype)

    varied: Call = pytree.tree_map_only(Tensor, moved, call)
    return varied
