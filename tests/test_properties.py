"""The laws as properties: random models, random masks, in float64.

``HYPOTHESIS_PROFILE=thorough pytest tests/test_properties.py`` looks much further.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.analysis import Neurons, analyze
from fxprune.errors import PreconditionError
from fxprune.masking.insertion import insert_masks
from fxprune.passes import RandomPruning
from fxprune.program import Program
from fxprune.shrinking.compact import compact_program
from tests.laws import EQUAL, ONNX, assert_same, call, gap, run_onnx, watched
from tests.strategies import MaskPlan, Recipe, mask_plans, recipes

# oneDNN says once a process that it leaves projections to the default kernel.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

SIZES = ((2, 3), (1, 1), (3, 5), (1, 4), (4, 2))


def traced(recipe: Recipe) -> tuple[nn.Module, Program, Neurons]:
    """The module, its program by law 1, and the analysis."""
    module = recipe.build()
    program = fxprune.trace(module, recipe.example(2, 3))
    assert_equal(recipe, module, program.module())
    return module, program, analyze(program)


def assert_equal(recipe: Recipe, expected: nn.Module, actual: nn.Module) -> None:
    for size in SIZES:
        assert_same(expected, actual, (recipe.example(*size),), EQUAL[torch.float64])


def check(recipe: Recipe, plan: MaskPlan) -> tuple[nn.Module, nn.Module, Neurons]:
    """Laws 1, 2 and 4 for one model and its masks; returns the masked and the compact module."""
    module, program, neurons = traced(recipe)
    program = replace(program, masks=plan.masks(program, neurons))
    detached = {n: t.detach().clone() for n, t in program.tensors.items()}
    with watched(module) as changes:
        masked = insert_masks(replace(program, tensors=detached), neurons).module()
        small = compact_program(program, neurons)
        compact = small.program.module()
        assert_equal(recipe, masked, compact)
        train(recipe, masked, compact)
    assert changes == []
    assert_masks_do_what_they_say(recipe, module, program, masked)
    return masked, compact, neurons


def train(recipe: Recipe, masked: nn.Module, compact: nn.Module) -> None:
    """Law 2 in train mode: batch norms use the batch, and keep its statistics."""
    left, right = copy.deepcopy(masked).train(), copy.deepcopy(compact).train()
    for size in ((3, 5), (4, 2)):
        inputs = (recipe.example(*size),)
        assert_same(copy.deepcopy(left), right, inputs, EQUAL[torch.float64])
        call(left, inputs)
    assert_equal(recipe, left.eval(), right.eval())


def assert_masks_do_what_they_say(
    recipe: Recipe, module: nn.Module, program: Program, masked: nn.Module
) -> None:
    """Masking connections alone is multiplying the user's weights."""
    if len(program.masks.neurons):
        return
    pruned = copy.deepcopy(module)
    with torch.no_grad():
        for name, keep in program.masks.connections.items():
            pruned.get_parameter(name).mul_(keep)
    assert_equal(recipe, pruned, masked)


@given(recipes(), mask_plans(neurons=True))
def test_cutting_neurons(recipe: Recipe, plan: MaskPlan) -> None:
    check(recipe, plan)


@given(recipes(), mask_plans(connections=True))
def test_cutting_connections(recipe: Recipe, plan: MaskPlan) -> None:
    check(recipe, plan)


@given(recipes(), mask_plans(neurons=True, connections=True))
def test_cutting_both(recipe: Recipe, plan: MaskPlan) -> None:
    check(recipe, plan)


@pytest.mark.slow
@given(
    recipes(),
    st.integers(0, 1000),
    st.sampled_from([(0.5, 0.0), (0.0, 0.8), (0.6, 0.5), (0.99, 0.0)]),
)
def test_onnx_computes_the_same(recipe: Recipe, seed: int, sparsities: tuple[float, float]) -> None:
    """Law 3: the file equals the compact program, at sizes that only this test tries."""
    neurons, connections = sparsities
    policy = [
        RandomPruning(connections, structure="connection", seed=seed),
        RandomPruning(neurons, seed=seed),
    ]
    module = recipe.build().float()
    example = single(recipe.example(2, 3))
    try:
        compact = fxprune.compile(module, policy, example_inputs=example, progress=False)
    except PreconditionError as error:
        assume("no neuron of this model may be removed" not in str(error))
        raise
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        compact.save_onnx(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for size in SIZES:
            inputs = (single(recipe.example(*size)),)
            expected = call(compact.module, inputs)
            assert gap(expected, run_onnx(session, inputs, expected)) <= ONNX, size


def single(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x
