"""The file holds every weight once and no node or text without need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.lowering.models import initializers, lower, nodes, weight_bytes


def batch_first(batch: int, time: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, time, 4),)


def tokens(batch: int, time: int) -> tuple[Tensor, ...]:
    return (torch.randint(30, (batch, time)),)


class Language(nn.Module):
    """Embedding and decoder share one tensor."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.decoder = nn.Linear(hidden, 30, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.lstm(self.embedding(x))[0])
        return y


def test_tied_weights_once(tmp_path: Path) -> None:
    language = Language()
    _, model = lower(language, tokens, tmp_path)
    assert weight_bytes(model) == sum(p.numel() for p in language.parameters()) * 4
    assert len({"embedding.weight", "decoder.weight"} & set(initializers(model))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_views(dtype: torch.dtype, tmp_path: Path) -> None:
    class Shared(nn.Module):
        """One weight, transposed in memory, under two names."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(5, 4, dtype=dtype).t())
            self.b = nn.Parameter(self.a.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(dtype) @ self.a) * (x.to(dtype) @ self.b)

    _, model = lower(Shared(), batch_first, tmp_path)
    assert weight_bytes(model) == 20 * 4


def test_a_module_called_twice_is_stored_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.gru(self.gru(x)[0])[0]
            return y

    twice = Twice()
    report, model = lower(twice, batch_first, tmp_path)
    assert weight_bytes(model) == sum(p.numel() for p in twice.parameters()) * 4
    assert report.operators == {"GRU": 2, "Squeeze": 2, "Transpose": 2}


def test_weights_keep_their_names(tmp_path: Path) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(x)[0])
            return y

    report, model = lower(Stack(), batch_first, tmp_path)
    assert report.operators == {"Add": 1, "LSTM": 2, "MatMul": 1, "Reshape": 2, "Transpose": 3}
    floats = {n for n, t in initializers(model).items() if t.data_type == onnx.TensorProto.FLOAT}
    layers = {f"rnn.{n}_l{k}" for n in ("weight_ih", "weight_hh", "bias_ih") for k in range(2)}
    assert floats == layers | {"head.weight", "head.bias"}


def test_no_metadata(tmp_path: Path) -> None:
    _, model = lower(Language(), tokens, tmp_path)
    assert not model.metadata_props and not model.graph.metadata_props
    assert not model.graph.value_info and not model.functions
    assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
    used = {name for n in model.graph.node for name in n.input}
    assert set(initializers(model)) <= used


@pytest.mark.parametrize("read", ["last-step", "last-state", "all-states"])
def test_reading_states_costs_little(read: str, tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, (h, _) = self.lstm(x)
            found: dict[str, Tensor] = {"last-step": y[:, -1], "last-state": h[-1], "all-states": h}
            return found[read]

    report, _ = lower(Reader(), batch_first, tmp_path)
    extra = {"last-step": {"Gather": 1, "Squeeze": 2}, "last-state": {"Squeeze": 2},
             "all-states": {"Concat": 1, "Squeeze": 1}}[read]  # fmt: skip
    assert report.operators == {"LSTM": 2, "Transpose": 1, **extra}


def test_weights_in_onnx_order(tmp_path: Path) -> None:
    gru = nn.GRU(4, 5)
    _, model = lower(gru, lambda b, t: (torch.randn(t, b, 4),), tmp_path)
    (node,) = nodes(model, "GRU")
    stored = onnx.numpy_helper.to_array(initializers(model)[node.input[1]])
    r, z, n = gru.get_parameter("weight_ih_l0").detach().numpy().reshape(3, 5, 4)
    np.testing.assert_array_equal(stored, np.concatenate([z, r, n])[None])


def test_recurrent_weights_can_be_quantized(tmp_path: Path) -> None:
    """onnxruntime's dynamic quantization needs W and R to be plain initializers."""
    pytest.importorskip("onnxruntime.quantization")
    from onnxruntime.quantization import quantize_dynamic

    report, _ = lower(nn.LSTM(16, 32), lambda b, t: (torch.randn(t, b, 16),), tmp_path)
    quantized = tmp_path / "int8.onnx"
    quantize_dynamic(report.path, quantized)
    assert [n.op_type for n in onnx.load(quantized).graph.node].count("DynamicQuantizeLSTM") == 1
