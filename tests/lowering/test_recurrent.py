"""Recurrent operations of every form become one ONNX node that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.tracing import recurrent
from tests.lowering.models import (
    GATES,
    Layer,
    attributes,
    initializers,
    lengths,
    lower,
    nodes,
    weight_bytes,
)

OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
# Of torch's own projected LSTM, which is the reference.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")

WEIGHT_WORK = {"Loop", "Scan", "Transpose", "Concat", "Unsqueeze", "Split"}


def sequence(batch: int, time: int) -> tuple[Tensor, ...]:
    return (torch.randn(time, batch, 4),)


def with_lengths(batch: int, time: int) -> tuple[Tensor, ...]:
    return (torch.randn(time, batch, 4), lengths(batch, time))


def with_states(kind: str, outputs: int = 5, hidden: int = 5) -> Any:
    def make(batch: int, time: int) -> tuple[Any, ...]:
        states = [torch.randn(batch, outputs)]
        if kind == "lstm":
            states.append(torch.randn(batch, hidden))
        return (torch.randn(time, batch, 4), lengths(batch, time), *states)

    return make


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("form", ["plain", "bias-free", "reverse", "lengths", "reverse-lengths"])
def test_one_node_per_layer_and_direction(kind: str, form: str, tmp_path: Path) -> None:
    layer = Layer(kind, bias=form != "bias-free", reverse="reverse" in form)
    report, model = lower(layer, with_lengths if "lengths" in form else sequence, tmp_path)
    (node,) = nodes(model, OPERATORS[kind])
    assert report.max_abs_error < 1e-6
    assert not WEIGHT_WORK & set(report.operators)
    expected = "reverse" if layer.reverse else "forward"
    assert attributes(node)["direction"].decode() == expected
    assert attributes(node).get("linear_before_reset", 0) == int(kind == "gru")
    assert weight_bytes(model) == sum(p.numel() for p in layer.parameters()) * 4
    gates = GATES[kind] * 5
    constants = initializers(model)
    assert list(constants[node.input[1]].dims) == [1, gates, 4]
    assert list(constants[node.input[2]].dims) == [1, gates, 5]
    if form == "bias-free":
        assert len(node.input) == 3
    else:
        assert list(constants[node.input[3]].dims) == [1, 2 * gates]


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_initial_states_are_inputs(kind: str, reverse: bool, tmp_path: Path) -> None:
    report, model = lower(Layer(kind, reverse=reverse), with_states(kind), tmp_path)
    (node,) = nodes(model, OPERATORS[kind])
    assert report.max_abs_error < 1e-6
    assert len(node.input) == (7 if kind == "lstm" else 6) and all(node.input)


def test_states_of_zeros_are_left_out(tmp_path: Path) -> None:
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            zeros = x.new_zeros(4, x.shape[1], 5)
            y: Tensor = self.lstm(x, (zeros, zeros))[0]
            return y

    _, model = lower(Zeros(), sequence, tmp_path)
    assert [len(node.input) for node in nodes(model, "LSTM")] == [4, 4]
    assert len(model.graph.node) == 6  # LSTM, Transpose, Reshape; twice


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN])
def test_two_directions_merge(module: Any, tmp_path: Path) -> None:
    report, model = lower(module(4, 5, 2, bidirectional=True), sequence, tmp_path)
    found = nodes(model, module.__name__)
    assert [attributes(n)["direction"] for n in found] == [b"bidirectional"] * 2
    assert report.max_abs_error < 1e-6
    gates = GATES.get(module.__name__.lower(), 1) * 5
    assert list(initializers(model)["weight_ih_l1"].dims) == [2, gates, 10]


class Directions(nn.Module):
    """A forward and a reverse layer on one sequence, joined over features."""

    def __init__(self, hidden: int, **options: Any) -> None:
        super().__init__()
        self.forth = Layer("lstm", hidden=5, **options)
        self.back = Layer("lstm", hidden=hidden, reverse=True, **options)

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        states = [(None, None) if h is None or c is None else (h[i], c[i]) for i in range(2)]
        y, *_ = self.forth(x, None, *states[0])
        z, *_ = self.back(x, None, *states[1])
        return torch.cat([y, z], -1)


def test_directions_of_unequal_sizes_stay_apart(tmp_path: Path) -> None:
    report, model = lower(Directions(3), sequence, tmp_path)
    assert [attributes(n)["direction"] for n in nodes(model, "LSTM")] == [b"forward", b"reverse"]
    assert report.operators == {"Concat": 1, "LSTM": 2, "Squeeze": 2}


def test_merged_directions_take_stacked_states_whole(tmp_path: Path) -> None:
    def make(batch: int, time: int) -> tuple[Tensor, ...]:
        return torch.randn(time, batch, 4), torch.randn(2, batch, 5)

    report, model = lower(nn.GRU(4, 5, bidirectional=True), make, tmp_path, names=("x", "h"))
    (node,) = nodes(model, "GRU")
    assert report.operators == {"GRU": 1, "Reshape": 1, "Transpose": 1}
    assert node.input[5] == "h" and node.output[1] == "output_1"


def test_merged_directions_are_read_apart_too(tmp_path: Path) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forth, self.back = Layer("gru"), Layer("gru", reverse=True)

        def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
            y, h_y = self.forth(x, lengths)
            z, h_z = self.back(x, lengths)
            return torch.cat([x, y, z], 2), y * z, h_y, h_z

    report, _ = lower(Apart(), with_lengths, tmp_path)
    assert report.operators["GRU"] == 1
    assert report.max_abs_error < 1e-6


def test_directions_that_feed_each_other_stay_apart(tmp_path: Path) -> None:
    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forth, self.back = Layer("gru"), Layer("gru", reverse=True)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            y, h = self.forth(x, None, h)
            return torch.cat([y, self.back(x, None, h)[0]], 2)

    def make(batch: int, time: int) -> tuple[Tensor, ...]:
        return torch.randn(time, batch, 4), torch.randn(batch, 5)

    report, _ = lower(Chained(), make, tmp_path)
    assert report.operators["GRU"] == 2


@pytest.mark.parametrize("reverse", [False, True])
def test_projection_is_folded(reverse: bool, tmp_path: Path) -> None:
    layer = Layer("lstm", hidden=6, outputs=3, reverse=reverse)
    report, model = lower(layer, with_lengths, tmp_path)
    (node,) = nodes(model, "LSTM")
    assert report.max_abs_error < 1e-6
    assert list(initializers(model)[node.input[2]].dims) == [1, 24, 6]
    assert report.notes == (
        "w_hr is folded into the recurrent weight, which grows from [24, 3] to [24, 6]",
    )


def test_projected_directions_merge(tmp_path: Path) -> None:
    report, _ = lower(nn.LSTM(4, 6, bidirectional=True, proj_size=3), sequence, tmp_path)
    assert report.operators["LSTM"] == 1
    assert report.max_abs_error < 1e-6


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_projection_with_initial_output(reverse: bool, rank: int | None, tmp_path: Path) -> None:
    """Through the pseudo-inverse, or as an input of the first step where there is none."""
    layer = Layer("lstm", hidden=6, outputs=3, reverse=reverse, rank=rank)
    report, _ = lower(layer, with_states("lstm", 3, 6), tmp_path)
    assert report.max_abs_error < 2e-6
    assert ("Where" in report.operators) == (rank is not None)
    assert len(report.notes) == (1 if rank is None else 2)


def test_projection_with_initial_output_without_lengths(tmp_path: Path) -> None:
    model = Directions(6, outputs=3, rank=2)
    model.forth = Layer("lstm", hidden=6, outputs=3, rank=2)

    def make(batch: int, time: int) -> tuple[Tensor, ...]:
        return torch.randn(time, batch, 4), torch.randn(2, batch, 3), torch.randn(2, batch, 6)

    report, _ = lower(model, make, tmp_path)
    assert report.max_abs_error < 2e-6
    assert report.operators["LSTM"] == 2


def test_weights_computed_from_inputs(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.forth, self.back = Layer("lstm"), Layer("lstm", reverse=True)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            outputs = [
                recurrent.lstm(
                    x, None, None, y.w_ih * scale, y.w_hh, y.b_ih, y.b_hh, reverse=y.reverse
                )[0]
                for y in (self.forth, self.back)
            ]
            return torch.cat(outputs, 2)

    def make(batch: int, time: int) -> tuple[Tensor, ...]:
        return torch.randn(time, batch, 4), torch.tensor(0.5 + time)

    report, _ = lower(Scaled(), make, tmp_path)
    assert report.operators["LSTM"] == 1
    assert report.max_abs_error < 1e-6


def test_normalized_weights_fold(tmp_path: Path) -> None:
    gru = nn.utils.parametrizations.weight_norm(nn.GRU(4, 5), "weight_hh_l0")
    gru.flatten_parameters = lambda: None
    report, _ = lower(gru, sequence, tmp_path)
    assert report.operators["GRU"] == 1
    assert not {"Mul", "Div", "Gather"} & set(report.operators)


@pytest.mark.parametrize(
    ("cell", "operator"),
    [
        (nn.LSTMCell(4, 5), "LSTM"),
        (nn.GRUCell(4, 5), "GRU"),
        (nn.RNNCell(4, 5), "RNN"),
        (nn.RNNCell(4, 5, nonlinearity="relu", bias=False), "RNN"),
    ],
)
def test_cells_share_their_weights(cell: Any, operator: str, tmp_path: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: Tensor) -> Tensor:
            state, steps = None, []
            for step in x.unbind(0):
                state = self.cell(step, state)
                steps.append(state[0] if isinstance(state, tuple) else state)
            return torch.stack(steps)

    report, model = lower(Loop(), sequence, tmp_path, sizes=((2, 6), (1, 6), (5, 6)))
    assert report.operators[operator] == 6
    assert report.max_abs_error < 1e-6
    assert weight_bytes(model) == sum(p.numel() for p in cell.parameters()) * 4
    assert not {"SequenceAt", "SplitToSequence", "Loop", "Transpose"} & set(report.operators)


def test_works_again_and_again(tmp_path: Path) -> None:
    """Dynamic time must not depend on what was exported before in the process."""
    for _ in range(3):
        for module in (nn.LSTM(4, 5), nn.GRU(4, 5), nn.RNN(4, 5)):
            report, _ = lower(module, sequence, tmp_path)
            assert report.max_abs_error < 1e-6
