"""Sparse connectivity learning on the zoo: hardened equals evaluated while training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fxprune
from fxprune.passes import SparseConnectivity
from tests.laws import assert_same
from tests.zoo import by_name

TRAINABLE = (
    "lstm-two-layer",
    "bigru-two-layer",
    "lstm-projected",
    "packed-bilstm-two-layer",
    "gru-cell-loop",
    "manual-lstm-joint",
    "tied-character-model",
    "residual-cnn",
)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("structure", ["connection", "filter"])
def test_hardened_computes_what_training_evaluated(name: str, structure: Any) -> None:
    model = by_name(name)
    torch.manual_seed(0)
    inputs = model.inputs(model.batch, model.time)
    chosen = SparseConnectivity(target=0.4, structure=structure, feature="unit")
    prepared = fxprune.prepare(model.build(), chosen, example_inputs=inputs, steps=6)
    parameters = prepared.module.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)
    prepared.module.train()
    for _ in range(6):
        outputs = pytree.tree_leaves(prepared.module(*model.inputs(model.batch, model.time)))
        loss = sum(o.square().mean() for o in outputs if o is not None and o.is_floating_point())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        prepared.step()
    prepared.module.eval()
    compact = prepared.convert()
    assert compact.report.sparsity > 0.4
    for module in (compact.masked, compact.module.eval()):
        assert_same(prepared.module, module, inputs, 1e-6)
