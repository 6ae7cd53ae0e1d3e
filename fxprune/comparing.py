"""Comparing results, with tolerances that follow from rounding.

A tolerance is the stated one (:data:`EQUAL` between programs, :data:`ONNX` between runtimes) times
the scale of the output. A steep function amplifies rounding beyond that though nothing is wrong,
so ten times the change is allowed as well that moving the inputs by one unit in the last place
makes in the reference. Where that is more than :data:`CHAOS`, a comparison would say nothing:
chaotic recurrences are compared over a few steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxprune.calls import Call

__all__ = [
    "CHAOTIC",
    "Difference",
    "Verdict",
    "compare_outputs",
    "judge",
    "rounding_effect",
    "tolerance_of",
]

EQUAL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative tolerance between two programs that must agree, by the precision they compute in."""

ONNX = 1e-4
"""Relative tolerance between a program and its ONNX file in onnxruntime."""

CHAOS = 1e-3
"""The most that is allowed for rounding, relative to the scale of the output."""

CHAOTIC = "the model is chaotic: rounding grows, so few steps were compared"


@dataclass(frozen=True)
class Difference:
    """How far two results are apart.

    Attributes:
        max_abs: largest absolute difference; infinite if structure, shape or type differ.
        max_rel: largest difference over the largest absolute reference value of its output.
        where: the output where ``max_rel`` was found, and what differs if it is not a value.
        values: whether it is values that differ, and not structure, shape or type.
    """

    max_abs: float
    max_rel: float
    where: str
    values: bool = True

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most ``tolerance`` times the output's scale."""
        return self.max_rel <= tolerance


def compare_outputs(expected: Any, actual: Any) -> Difference:
    """Compares two results leaf by leaf.

    Args:
        expected: the reference; tensors in tuples, lists, dicts, or None.
        actual: what must equal it.

    Returns:
        The largest differences. The scale of an output is its largest absolute reference value,
        at least 1, so that outputs near zero are compared absolutely.

    Example:
        >>> compare_outputs(torch.tensor([2.0]), torch.tensor([2.5])).max_rel
        0.25
    """
    references, structure = pytree.tree_flatten(expected)
    results, other = pytree.tree_flatten(actual)
    if structure != other:
        return _unlike(f"structure {other} instead of {structure}")
    worst = Difference(0.0, 0.0, "output_0")
    for index, (reference, result) in enumerate(zip(references, results, strict=True)):
        found = _compare_leaf(f"output_{index}", reference, result)
        largest = max(worst.max_abs, found.max_abs)
        worst = replace(worst if found.max_rel <= worst.max_rel else found, max_abs=largest)
    return worst


def _compare_leaf(name: str, expected: Any, actual: Any) -> Difference:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = expected is None and actual is None
        return Difference(0.0, 0.0, name) if same else _unlike(name)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        found, wanted = (f"{list(t.shape)} {t.dtype}" for t in (actual, expected))
        return _unlike(f"{name}: {found} instead of {wanted}")
    if expected.numel() == 0:
        return Difference(0.0, 0.0, name)
    parts = zip(*(t.detach().reshape(-1).split(_CHUNK) for t in (expected, actual)), strict=True)
    gaps, scales = zip(*(_largest(left, right) for left, right in parts), strict=True)
    return Difference(max(gaps), max(gaps) / max(1.0, *scales), name)


def _unlike(where: str) -> Difference:
    return Difference(math.inf, math.inf, where, values=False)


_CHUNK = 1 << 18  # entries compared at a time, in double precision


def _largest(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """The largest absolute difference and the largest finite reference value."""
    wide = torch.float64 if not expected.is_complex() else torch.complex128
    left, right = expected.to(wide), actual.to(wide)
    # NaN and infinity agree where both have the same.
    agree = torch.eq(left, right).logical_or(left.isnan() & right.isnan())
    gap = torch.where(agree, 0.0, (left - right).abs())
    gap = gap.nan_to_num(nan=float("inf"), posinf=float("inf"))
    finite = torch.where(left.isfinite(), left.abs(), 0.0)
    return float(gap.max()), float(finite.max())


def tolerance_of(expected: Any, kind: Literal["equal", "onnx"]) -> float:
    """The stated tolerance for a result, by the least precise floating type in it."""
    dtypes = {t.dtype for t in pytree.tree_leaves(expected) if isinstance(t, Tensor)}
    equal = max((EQUAL.get(d, 0.0) for d in dtypes), default=0.0) or EQUAL[torch.float32]
    return equal if kind == "equal" else max(ONNX, equal)


# What rounding explains ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What came of a comparison.

    Attributes:
        difference: how far the results are apart; for a chaotic model over a few steps.
        tolerance: the difference allowed.
        chaotic: whether rounding alone changes the outputs noticeably.
    """

    difference: Difference
    tolerance: float
    chaotic: bool = False

    @property
    def passed(self) -> bool:
        """Whether the results agree."""
        return self.difference.within(self.tolerance)


def judge(
    difference: Callable[[Call, Any], Difference],
    reference: Callable[[Call], Any],
    call: Call,
    expected: Any,
    *,
    stated: float,
    short: Callable[[], tuple[Call, Any] | None],
) -> Verdict:
    """Compares on one call, and allows what rounding explains.

    Args:
        difference: compares on a call, of which the outputs of the reference are given too.
        reference: computes these outputs.
        call: the inputs.
        expected: what the reference makes of them.
        stated: the tolerance where rounding does not grow.
        short: gives the call cut to a few steps, and its outputs, for chaotic models; None if it
            cannot be cut.
    """
    found = difference(call, expected)
    if found.within(stated) or not found.values:
        return Verdict(found, stated)
    rounding = 10 * rounding_effect(reference, call, expected)
    few = short() if rounding > CHAOS else None
    if few is None:
        return Verdict(found, max(stated, min(rounding, CHAOS)), rounding > CHAOS)
    verdict = judge(difference, reference, *few, stated=stated, short=lambda: None)
    return replace(verdict, chaotic=True)


def rounding_effect(reference: Callable[[Call], Any], call: Call, expected: Any) -> float:
    """Relative change of a result when the floating inputs move by one unit in the last place."""
    return compare_outputs(expected, reference(pytree.tree_map_only(Tensor, _moved, call))).max_rel


def _moved(x: Tensor) -> Tensor:
    if not x.is_floating_point() or not x.numel():
        return x
    # The next number after 0 is lost in any sum: zeros move as far as the largest entry, or 1.
    scale = x.abs().max().nan_to_num()
    step = torch.finfo(x.dtype).eps * torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.where(x == 0, step, torch.nextafter(x, torch.full_like(x, float("inf"))))
