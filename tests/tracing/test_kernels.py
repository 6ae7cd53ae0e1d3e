"""Torch's own recurrent operations, called by a model itself, become fxprune's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.program import Kind
from fxprune.tracing import recurrent
from tests.small import HALF, frames

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

_VF: Any = torch._VF


class Direct(nn.Module):
    """Calls the operation with the weights of a layer, two layers in two directions."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        layer: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)
        options = {"dropout": 0.5, "batch_first": True, "bidirectional": True, **options}
        self.rnn = layer(3, 4, num_layers=2, **options)
        self.head = nn.Linear(2 * (self.rnn.proj_size or 4), 2)
        self.kernel, self.lstm = getattr(_VF, kind), kind == "lstm"

    def forward(self, x: Tensor) -> Tensor:
        """Starts from zeros."""
        rnn, batch = self.rnn, x.shape[0]
        h = x.new_zeros(4, batch, rnn.proj_size or 4)
        hx = (h, x.new_zeros(4, batch, 4)) if self.lstm else h
        y, *_ = self.kernel(
            x, hx, rnn._flat_weights, rnn.bias, 2, 0.5, self.training, batch_first=True,
            bidirectional=True,
        )  # fmt: skip
        tags: Tensor = self.head(y)
        return tags


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lstm", {}),
        ("lstm", {"proj_size": 2, "bias": False}),
        ("gru", {}),
        ("rnn_tanh", {}),
        ("rnn_relu", {"bias": False}),
    ],
)
def test_direct_calls_are_traced_like_modules(kind: str, options: dict[str, Any]) -> None:
    model = Direct(kind, **options)
    program = fxprune.trace(model, frames())
    ours = (recurrent.lstm, recurrent.gru, recurrent.rnn)
    assert len([n for n in program.graph.nodes if n.target in ours]) == 4
    assert program.inputs[0].shape is not None
    assert [type(s) for s in program.inputs[0].shape] == [str, str, int]
    assert set(program.kinds.values()) == {Kind.PARAMETER}
    assert set(program.tensors) == set(dict(model.named_parameters()))
    assert list(program.switches.values()) == [1.0]
    x = frames(3, 7)
    torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=1e-6, atol=1e-6)


def test_direct_calls_are_pruned() -> None:
    compact = fxprune.compile(Direct("gru"), HALF, example_inputs=frames(), progress=False)
    assert compact.module.get_parameter("rnn.weight_hh_l1_reverse").shape == (6, 2)


class Inside(nn.Module):
    """Calls the operation on the inside of a packed sequence."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn: Any = nn.LSTM(3, 4) if kind == "lstm" else nn.GRU(3, 4)
        self.kernel, self.lstm = getattr(_VF, kind), kind == "lstm"

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Returns the final state."""
        h = x.new_zeros(1, 1, 4)
        hx = (h, h) if self.lstm else h
        weights = self.rnn._flat_weights
        state: Tensor = self.kernel(x, sizes, hx, weights, True, 1, 0.0, False, False)[1]
        return state


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_packed_insides_are_refused(kind: str) -> None:
    call = (torch.randn(5, 3), torch.ones(5, dtype=torch.int64))
    with pytest.raises(TraceError, match=rf"torch\.{kind} is called on the inside of a packed"):
        fxprune.trace(Inside(kind), call)
