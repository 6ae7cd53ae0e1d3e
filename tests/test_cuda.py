"""Models on a GPU: the laws hold there too, and what is made stays on the device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.comparing import compare_outputs
from fxprune.passes import Magnitude
from tests.zoo import by_name

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS = [
    "lstm",
    "gru",
    "rnn-tanh",
    "bilstm",
    "lstm-projected",
    "packed-bilstm-two-layer",
    "packed-lstm-states",
    "lstm-states-in-out",
    "lstm-cell-loop",
    "normalized-lstms",
    "attention-between-lstms",
    "conv-lstm",
    "grouped-grus",
    "luong-decoder",
    "two-stage-enhancer",
    "tied-character-model",
]


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _on_gpu(name: str) -> tuple[nn.Module, tuple[object, ...]]:
    zoo = by_name(name)
    torch.manual_seed(0)
    inputs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.cuda() if t.is_floating_point() else t, zoo.inputs(zoo.batch, 5)
    )
    tokens = any(isinstance(m, nn.Embedding) for m in zoo.build().modules())
    if tokens and not name.startswith("packed"):
        inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, inputs)
    return zoo.build().cuda(), inputs


@pytest.mark.parametrize("structure", ["neuron", "connection"])
@pytest.mark.parametrize("name", MODELS)
def test_compact_equals_masked_on_the_device(name: str, structure: str) -> None:
    model, inputs = _on_gpu(name)
    program = fxprune.trace(model, inputs)
    compact = fxprune.compile(program, f"magnitude{{sparsity=0.5,structure={structure}}}")
    assert {p.device.type for p in compact.module.parameters()} == {"cuda"}
    with torch.no_grad():
        difference = compare_outputs(compact.masked(*inputs), compact.module(*inputs))
    assert difference.max_rel <= 1e-5


def test_a_compact_model_trains_on_the_device() -> None:
    model, inputs = _on_gpu("bilstm")
    compact = fxprune.compile(model, Magnitude(sparsity=0.5), example_inputs=inputs)
    module = compact.module.train()
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(*inputs).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_onnx_of_a_model_on_the_device(tmp_path: Path) -> None:
    model, inputs = _on_gpu("lstm")
    compact = fxprune.compile(model, Magnitude(sparsity=0.5), example_inputs=inputs)
    report = compact.save_onnx(tmp_path / "model.onnx")
    assert report.max_abs_error <= 1e-4
