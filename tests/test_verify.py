"""A shrunk program is compared at several sizes, and a wrong one is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.calls import Call
from fxprune.commands.verifying import verify
from fxprune.errors import VerificationError
from fxprune.masking.insertion import insert_masks
from fxprune.passes import Magnitude
from fxprune.program import Program
from fxprune.shrinking.compact import compact_program
from fxprune.shrinking.shrink import Shrunk
from fxprune.verify import verify_programs
from tests.small import Tagger, frames


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


def test_chaos_is_told_and_compared_over_few_steps(tmp_path: Path) -> None:
    x = torch.randn(100, 2, 1)
    compact = fxprune.compile(Chaotic(), Magnitude(0.3), example_inputs=x, progress=False)
    verification = compact.report.verification
    assert verification.chaotic
    assert verification.max_abs_error < 1e-5  # over 8 steps
    assert "chaotic" in str(compact.report)
    gap = (compact.masked(x) - compact.module(x)).detach().abs().max()
    assert float(gap) > 1e-3  # over 100
    # the ONNX file is judged alike, when it is written and by the command line
    report = compact.save_onnx(tmp_path / "m.onnx")
    found = verify(compact.program, tmp_path / "m.onnx")
    assert "the model is chaotic" in report.notes[0] and report.max_abs_error < 1e-4
    assert found["example"].chaotic and found["example"].difference.max_abs < 1e-4
