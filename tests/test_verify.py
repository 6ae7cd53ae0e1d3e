"""Comparisons see every difference, and allow what rounding explains and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.errors import VerificationError
from fxprune.masking.insertion import insert_masks
from fxprune.passes import Magnitude
from fxprune.program import Call, Program
from fxprune.shrinking.compact import compact_program
from fxprune.shrinking.shrink import Shrunk
from fxprune.verify import compare_outputs, rounding_effect, tolerance_of, verify_programs
from tests.small import Tagger, frames

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
    call: Call = ((torch.tensor([1.0], dtype=torch.float64),), {})

    def double(x: Tensor) -> Tensor:
        return 2 * x

    def steep(x: Tensor) -> Tensor:
        return 1e6 * (x - 1)

    assert rounding_effect(double, call, double(*call[0])) == 2**-52
    assert rounding_effect(steep, call, steep(*call[0])) == pytest.approx(1e6 * 2**-52, rel=1e-6)
    assert rounding_effect(torch.floor, call, torch.tensor([1.0], dtype=torch.float64)) == 0.0


def shrunk(program: Program) -> tuple[Program, fx.GraphModule, Shrunk]:
    neurons = analyze(program)
    masks = program.masks.cut_neurons(neurons.group("rnn.l0").neurons[:3])
    program = replace(program, masks=masks)
    return program, insert_masks(program, neurons).module(), compact_program(program, neurons)


@pytest.fixture(scope="module")
def case() -> tuple[Program, fx.GraphModule, Shrunk]:
    return shrunk(fxprune.trace(Tagger(), frames()))


def test_several_sizes_are_tried(case: Any) -> None:
    program, masked, small = case
    found = verify_programs(program, masked, small, small.program.module())
    assert found.sizes[0] == "example"
    assert len(found.sizes) == 5
    assert "batch=1, time=1" in found.sizes
    assert found.max_abs_error < 1e-6
    assert (found.tolerance, found.chaotic) == (1e-5, False)


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_wrong_weight_is_found(case: Any, change: float) -> None:
    program, masked, small = case
    module = small.program.module()
    wrong = fx.GraphModule(module, module.graph)
    state = {n: p.detach().clone() for n, p in module.named_parameters()}
    state["head.weight"][0, 0] += change
    result = torch.func.functional_call
    wrong.forward = lambda *args: result(module, state, args)
    with pytest.raises(VerificationError, match="This is a defect of fxprune") as caught:
        verify_programs(program, masked, small, wrong)
    assert caught.value.where == "output_0 at example"
    assert caught.value.pass_name == "shrink"
    assert caught.value.max_rel > 1e-5


def test_a_compact_program_that_fails_is_our_error(case: Any) -> None:
    program, masked, small = case
    module = small.program.module()
    broken = fx.GraphModule(module, module.graph)

    def fail(*_: Tensor) -> None:
        raise RuntimeError("shapes do not fit")

    broken.forward = fail
    text = "compact program fails where the masked one runs: shapes do not fit"
    with pytest.raises(VerificationError, match=text):
        verify_programs(program, masked, small, broken)


def test_calls_given_replace_the_sizes(case: Any) -> None:
    program, masked, small = case
    calls: list[Call] = [((frames(4, 2),), {}), ((frames(1, 9),), {})]
    found = verify_programs(program, masked, small, small.program.module(), calls)
    assert found.sizes == ("verify_inputs[0]", "verify_inputs[1]")


class Chaotic(nn.Module):
    """A recurrence that multiplies distances: after many steps rounding is all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn, self.head = nn.Linear(1, 4), nn.RNN(4, 30), nn.Linear(30, 1)
        with torch.no_grad():
            rotation, _ = torch.linalg.qr(torch.randn(30, 30))
            self.rnn.get_parameter("weight_hh_l0").copy_(4 * rotation)

    def forward(self, x: Tensor) -> Tensor:
        """Reads every step."""
        y: Tensor = self.head(self.rnn(self.stem(x))[0])
        return y


def test_chaos_is_told_and_compared_over_few_steps() -> None:
    x = torch.randn(100, 2, 1)
    compact = fxprune.compile(Chaotic(), Magnitude(0.3), example_inputs=x, progress=False)
    verification = compact.report.verification
    assert verification.chaotic
    assert verification.max_abs_error < 1e-5  # over 8 steps
    assert "chaotic" in str(compact.report)
    gap = (compact.masked(x) - compact.module(x)).detach().abs().max()
    assert float(gap) > 1e-3  # over 100
