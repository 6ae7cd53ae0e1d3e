"""Gates in the graph, of every zoo model: what they cut, what they scale, what hardening gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fxprune.analysis import Neurons, analyze
from fxprune.masking.gating import GATES, fold_scales, insert_gates, mask_module_name
from fxprune.masking.insertion import insert_masks
from fxprune.masking.masks import Masks
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from fxprune.weights import like
from tests.laws import assert_same, at_precision
from tests.zoo import ZOO, ZooModel

QUICK = {
    "bigru-two-layer",
    "lstm-projected-two-layer",
    "lstm-states-in-out",
    "packed-bilstm-two-layer",
    "gru-cell-loop",
    "manual-lstm",
    "same-gru-twice",
    "residual-lstms",
    "normalized-lstms",
    "grouped-grus",
    "luong-decoder",
    "tied-projected-lm",
    "tied-character-model",
    "conv2d-gru",
    "two-stage-enhancer",
    "residual-cnn",
    "transformer-tagger",
}
"""What differs most; the others are slow tests."""

MODELS = [
    pytest.param(model, id=model.name, marks=() if model.name in QUICK else pytest.mark.slow)
    for model in ZOO
]


class Fixed(nn.Module):
    """Gates that stay as they are."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", torch.cat([scale, torch.ones(1)]))

    def forward(self) -> tuple[Tensor, Tensor]:
        scale = self.get_buffer("scale")
        return scale, (scale != 0).to(scale)


def analysed(model: ZooModel) -> tuple[Program, Neurons]:
    torch.manual_seed(0)
    inputs = at_precision(model.inputs(model.batch, model.time), torch.float64)
    program = trace(model.build().double(), inputs)
    return program, analyze(program)


def some_cut(neurons: Neurons) -> Tensor:
    """Every other free neuron, but not all of a group."""
    cut = [g.neurons[g.free][1::2] for g in neurons.groups]
    return torch.cat([torch.empty(0, dtype=torch.int64), *cut])


@pytest.mark.parametrize("model", MODELS)
def test_hardened_gates_compute_what_the_gates_did(model: ZooModel) -> None:
    program, neurons = analysed(model)
    scale = torch.ones(neurons.count, dtype=torch.float64)
    scale[neurons.free] = 0.2 + torch.rand(int(neurons.free.sum()), dtype=torch.float64)
    scale[some_cut(neurons)] = 0.0
    gates = Fixed(scale)
    gated = insert_gates(program, neurons, gated=neurons.free).module({GATES: gates})

    folded = fold_scales(program, neurons, gates()[0])
    tensors = {n: like(t, folded.get(n, t).detach()) for n, t in program.tensors.items()}
    masks = Masks(neurons=(scale == 0).nonzero().flatten())
    hard = insert_masks(replace(program, tensors=tensors, masks=masks), neurons).module()

    for name, tensor in program.tensors.items():  # folding takes copies
        assert tensor is program.tensors[name]
    inputs = at_precision(model.inputs(model.batch, model.time), torch.float64)
    assert_same(gated, hard, inputs, 1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_gates_on_values_compute_what_gates_on_weights_do(model: ZooModel) -> None:
    program, neurons = analysed(model)
    scale = torch.ones(neurons.count, dtype=torch.float64)
    scale[some_cut(neurons)] = 0.0
    gates = {GATES: Fixed(scale)}
    on_weights, on_values = (
        insert_gates(program, neurons, gated=neurons.free, values=values).module(gates)
        for values in (False, True)
    )
    inputs = at_precision(model.inputs(model.batch, model.time), torch.float64)
    assert_same(on_weights, on_values, inputs, 1e-12)


def test_mask_modules_of_two_weights_never_share_a_name() -> None:
    names = ["a.b_c", "a_b.c", "a_b_c", "a.b.c", "a._b", "a_.b", "a_d_u"]
    assert len({mask_module_name(name) for name in names}) == len(names)
