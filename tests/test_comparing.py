"""Comparisons see every difference, and allow what rounding explains and no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.calls import Call, run_call
from fxprune.comparing import (
    Difference,
    compare_outputs,
    judge,
    rounding_effect,
    tolerance_of,
)

ONE = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("expected", "actual", "max_abs", "max_rel"),
    [
        (ONE, ONE.clone(), 0.0, 0.0),
        (ONE, torch.tensor([1.0, 2.5]), 0.5, 0.25),
        (torch.tensor([0.0]), torch.tensor([0.1]), 0.1, 0.1),
        ((ONE, None), (ONE, None), 0.0, 0.0),
        ({"a": ONE, "b": [ONE]}, {"a": ONE, "b": [ONE + 1]}, 1.0, 0.5),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), 0.0, 0.0),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), 0.0, 0.0),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 1j]), 1.0, 1 / 5**0.5),
        (torch.tensor([3, 4]), torch.tensor([3, 6]), 2.0, 0.5),
        (torch.zeros(0, 2), torch.zeros(0, 2), 0.0, 0.0),
    ],
)
def test_differences(expected: Any, actual: Any, max_abs: float, max_rel: float) -> None:
    found = compare_outputs(expected, actual)
    assert found.max_abs == pytest.approx(max_abs, rel=1e-6)
    assert found.max_rel == pytest.approx(max_rel, rel=1e-6)
    assert found.within(max_rel * (1 + 1e-6))
    assert not max_rel or not found.within(0.99 * max_rel)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (ONE, ONE.double()),
        (ONE, ONE.unsqueeze(0)),
        (ONE, None),
        ((ONE,), [ONE]),
        ({"a": ONE}, {"b": ONE}),
        ((ONE, ONE), (ONE,)),
        (ONE, torch.tensor([1.0, float("nan")])),
        (ONE, torch.tensor([1.0, float("inf")])),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")])),
    ],
)
def test_what_can_never_be_equal(expected: Any, actual: Any) -> None:
    found = compare_outputs(expected, actual)
    assert found.max_rel == float("inf")
    assert not found.within(1e30)


def test_the_worst_output_is_named() -> None:
    found = compare_outputs((ONE, ONE, ONE), (ONE, ONE + 0.5, ONE + 0.1))
    assert found.where == "output_1"
    found = compare_outputs((1000 * ONE, ONE), (1000 * ONE + 1, ONE + 0.1))
    assert (found.where, found.max_abs) == ("output_1", 1.0)
    assert "float64 instead of [2] torch.float32" in compare_outputs(ONE, ONE.double()).where
    assert "instead of" in compare_outputs((ONE,), [ONE]).where


@pytest.mark.parametrize(
    ("dtype", "equal", "onnx"),
    [
        (torch.float64, 1e-12, 1e-4),
        (torch.float32, 1e-5, 1e-4),
        (torch.bfloat16, 1e-2, 1e-2),
        (torch.float16, 1e-2, 1e-2),
        (torch.int64, 1e-5, 1e-4),
    ],
)
def test_tolerances_follow_the_precision(dtype: torch.dtype, equal: float, onnx: float) -> None:
    result = (torch.zeros(1, dtype=dtype), None)
    assert tolerance_of(result, "equal") == equal
    assert tolerance_of(result, "onnx") == onnx
    mixed = (torch.zeros(1, dtype=torch.float64), torch.zeros(1))
    assert tolerance_of(mixed, "equal") == 1e-5


def test_rounding_grows_through_steep_functions() -> None:
    def effect(function: Callable[[Tensor], Tensor], *values: float) -> float:
        call: Call = ((torch.tensor(values or [1.0], dtype=torch.float64),), {})
        reference = partial(run_call, function)
        return rounding_effect(reference, call, reference(call))

    assert effect(lambda x: 2 * x) == 2**-52
    assert effect(lambda x: 1e6 * (x - 1)) == pytest.approx(1e6 * 2**-52, rel=1e-6)
    assert effect(torch.floor) == 0.0
    assert effect(lambda x: 1e6 * x, 0.0) == 1e6 * 2**-52  # an example of zeros feels it too
    assert effect(lambda x: x[:1], 0.0, 4.0) == 4 * 2**-52


def steep(factor: float) -> Callable[[Call], Tensor]:
    return lambda call: factor * (call[0][0] - 1)


@pytest.mark.parametrize(
    ("factor", "error", "passed", "tolerance", "chaotic"),
    [
        (1.0, 1e-13, True, 1e-12, False),
        (1.0, 1e-11, False, 1e-12, False),  # rounding explains 1e-15
        (1e6, 1e-9, True, 10 * 1e6 * 2**-52, False),
        (1e6, 1e-8, False, 10 * 1e6 * 2**-52, False),
        (1e13, 1e-3, True, 1e-12, True),  # the short call is right
        (1e13, math.nan, True, 1e-12, True),
    ],
)
def test_what_rounding_explains(
    factor: float, error: float, passed: bool, tolerance: float, chaotic: bool
) -> None:
    """A result is off on the call, and right on the call cut short."""
    one = torch.ones(1, dtype=torch.float64)
    long: Call = ((one,), {})
    short: Call = ((one[:0],), {})

    def difference(call: Call, expected: Tensor) -> Difference:
        return compare_outputs(expected, expected + error if call is long else expected)

    reference = steep(factor)
    cut = lambda: (short, reference(short))  # noqa: E731
    found = judge(difference, reference, long, reference(long), stated=1e-12, short=cut)
    assert (found.passed, found.chaotic) == (passed, chaotic)
    assert found.tolerance == pytest.approx(tolerance, rel=1e-6)


def test_chaos_excuses_neither_a_wrong_short_call_nor_a_wrong_shape() -> None:
    reference = steep(1e13)
    call: Call = ((torch.ones(2, dtype=torch.float64),), {})
    expected = reference(call)

    def off(call: Call, expected: Tensor) -> Difference:
        return compare_outputs(expected, expected + 1)

    def cut(call: Call, expected: Tensor) -> Difference:
        return compare_outputs(expected, expected[:1])

    for short in (lambda: (call, expected), lambda: None):
        found = judge(off, reference, call, expected, stated=1e-12, short=short)
        assert (found.passed, found.chaotic, found.tolerance) == (False, True, 1e-3)
    found = judge(cut, reference, call, expected, stated=1e-12, short=lambda: None)
    assert (found.passed, found.chaotic) == (False, False)
