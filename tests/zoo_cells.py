"""Zoo: cells called once or in a loop, and recurrences written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo_model import (
    INPUT,
    RECURRENT,
    Output,
    ZooModel,
    cell,
    features,
    floats,
    plain,
    weights,
)

# ------------------------------------------------------------------------------------------ cells


class LstmCellStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Output:
        h, c = self.cell(x, (h, c))
        return self.head(h), h, c


class CellStep(nn.Module):
    def __init__(self, cell: nn.GRUCell | nn.RNNCell) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(cell.hidden_size, 3)

    def forward(self, x: Tensor, h: Tensor) -> Output:
        h = self.cell(x, h)
        return self.head(h), h


class LstmCellLoop(nn.Module):
    """The head reads all steps at once."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        h = c = x.new_zeros(x.shape[0], 8)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(h)
        return self.head(torch.stack(outputs, dim=1))


class GruCellLoop(nn.Module):
    """The cell makes its own initial state; the last step alone is read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Output:
        h = None
        for x_t in x.unbind(1):
            h = self.cell(x_t, h)
        return self.head(h)


class RnnCellLoop(nn.Module):
    """A linear layer before the cell and the head after it, both inside the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.cell = nn.RNNCell(6, 7, nonlinearity="relu")
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        h = x.new_zeros(x.shape[0], 7)
        outputs = []
        for t in range(x.shape[1]):
            h = self.cell(torch.tanh(self.stem(x[:, t])), h)
            outputs.append(self.head(h))
        return torch.stack(outputs, dim=1), h


class StackedCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.LSTMCell(5, 8)
        self.norm = nn.LayerNorm(8)
        self.upper = nn.LSTMCell(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Output:
        batch = x.shape[0]
        lower = (x.new_zeros(batch, 8), x.new_zeros(batch, 8))
        upper = (x.new_zeros(batch, 6), x.new_zeros(batch, 6))
        outputs = []
        for t in range(x.shape[1]):
            lower = self.lower(x[:, t], lower)
            upper = self.upper(self.norm(lower[0]), upper)
            outputs.append(upper[0])
        return self.head(torch.stack(outputs, dim=1)), upper[1]


CELLS = (
    ZooModel(
        "lstm-cell-step",
        LstmCellStep,
        lambda batch, time: tuple(floats(batch, n, seed=n) for n in (5, 8, 8)),
        cell("cell", calls=1) | plain("head"),
        time_varies=False,
        notes="streaming: the states enter and leave",
    ),
    ZooModel(
        "gru-cell-step",
        lambda: CellStep(nn.GRUCell(4, 9)),
        lambda batch, time: (floats(batch, 4), floats(batch, 9)),
        cell("cell", calls=1) | plain("head"),
        batch=1,
        time_varies=False,
    ),
    ZooModel(
        "rnn-cell-step",
        lambda: CellStep(nn.RNNCell(5, 7, bias=False)),
        lambda batch, time: (floats(batch, 5), floats(batch, 7)),
        cell("cell", calls=1) | plain("head"),
        time_varies=False,
    ),
    ZooModel(
        "lstm-cell-loop",
        LstmCellLoop,
        features(5),
        cell("cell", calls=5) | plain("head"),
        time_varies=False,
    ),
    ZooModel(
        "gru-cell-loop",
        GruCellLoop,
        features(4),
        cell("cell", calls=5) | plain("head"),
        time_varies=False,
    ),
    ZooModel(
        "rnn-cell-loop",
        RnnCellLoop,
        features(5),
        plain("stem", "head", calls=5) | cell("cell", calls=5),
        time_varies=False,
        notes="stem and head are called at every step, but no call depends on an earlier one",
    ),
    ZooModel(
        "stacked-lstm-cells",
        StackedCells,
        features(5),
        cell("lower", calls=5) | cell("upper", calls=5) | plain("head"),
        time_varies=False,
    ),
)

# ---------------------------------------------------------------------------------------- by hand


class ManualLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_x = nn.Linear(5, 4 * 8)
        self.w_h = nn.Linear(8, 4 * 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        h = c = x.new_zeros(x.shape[0], 8)
        outputs = []
        for x_t in x.unbind(1):
            i, f, g, o = (self.w_x(x_t) + self.w_h(h)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return self.head(torch.stack(outputs, dim=1))


class PartsLstm(nn.Module):
    """Every gate has parameters of its own, put together for one product."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(6, 5) / 3 for _ in range(4)])
        self.u = nn.ParameterList([torch.randn(6, 6) / 3 for _ in range(4)])
        self.b = nn.ParameterList([torch.randn(6) / 3 for _ in range(4)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Output:
        w, u, b = torch.cat([*self.w]), torch.cat([*self.u]), torch.cat([*self.b])
        h = c = x.new_zeros(x.shape[0], 6)
        for x_t in x.unbind(1):
            i, f, g, o = torch.chunk(F.linear(x_t, w, b) + h @ u.t(), 4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class JointLstm(nn.Module):
    """One matrix reads the step and the state together; the cell is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(5 + 7, 4 * 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        h = c = x.new_zeros(x.shape[0], 7)
        for t in range(x.shape[1]):
            gates = self.gates(torch.cat([x[:, t], h], dim=1))
            i, f, o = torch.sigmoid(gates[:, :21]).split(7, dim=1)
            c = f * c + i * torch.tanh(gates[:, 21:])
            h = o * torch.tanh(self.norm(c))
        return self.head(h)


class ManualGru(nn.Module):
    """The input matrix acts on the whole sequence before the loop; reset before the product."""

    def __init__(self) -> None:
        super().__init__()
        self.w_x = nn.Linear(4, 3 * 9)
        self.u_zr = nn.Linear(9, 2 * 9, bias=False)
        self.u_n = nn.Linear(9, 9, bias=False)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Output:
        h = x.new_zeros(x.shape[0], 9)
        outputs = []
        for x_t in self.w_x(x).unbind(1):
            zr = torch.sigmoid(x_t[:, :18] + self.u_zr(h))
            z, r = zr[:, :9], zr[:, 9:]
            h = (1 - z) * torch.tanh(x_t[:, 18:] + self.u_n(r * h)) + z * h
            outputs.append(h)
        return self.head(torch.stack(outputs, dim=1))


class ManualRnn(nn.Module):
    """Matrices without modules, written as they are in books."""

    def __init__(self) -> None:
        super().__init__()
        self.w_x = nn.Parameter(torch.empty(7, 5).uniform_(-0.4, 0.4))
        self.w_h = nn.Parameter(torch.empty(7, 7).uniform_(-0.4, 0.4))
        self.bias = nn.Parameter(torch.empty(7).uniform_(-0.4, 0.4))
        self.w_y = nn.Parameter(torch.empty(3, 7).uniform_(-0.4, 0.4))

    def forward(self, x: Tensor) -> Output:
        h = x.new_zeros(x.shape[0], 7)
        outputs = []
        for t in range(x.shape[1]):
            h = torch.tanh(F.linear(x[:, t], self.w_x, self.bias) + h @ self.w_h.T)
            outputs.append(h @ self.w_y.T)
        return torch.stack(outputs, dim=1)


class ManualLstmStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_x = nn.Linear(5, 4 * 8)
        self.w_h = nn.Linear(8, 4 * 8)
        self.hidden = nn.Linear(8, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Output:
        i, f, g, o = torch.chunk(self.w_x(x) + self.w_h(h), 4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(torch.relu(self.hidden(h))), h, c


MANUAL = (
    ZooModel(
        "manual-lstm",
        ManualLstm,
        features(5),
        {"w_x.weight": INPUT * 5, "w_h.weight": RECURRENT * 5} | plain("head"),
        time_varies=False,
        notes="h_5 is the same neuron as h_1, so the last use of w_x is input like the others",
    ),
    ZooModel(
        "manual-lstm-parts",
        PartsLstm,
        features(5),
        {f"w.{i}": INPUT * 5 for i in range(4)}
        | {f"u.{i}": RECURRENT * 5 for i in range(4)}
        | plain("head"),
        time_varies=False,
    ),
    ZooModel(
        "manual-lstm-joint",
        JointLstm,
        features(5),
        weights(RECURRENT, "gates", calls=5) | plain("head"),
        time_varies=False,
        notes="one tensor for both products, and its next use depends on it: nothing is input",
    ),
    ZooModel(
        "manual-gru",
        ManualGru,
        features(4),
        weights(INPUT, "w_x") | weights(RECURRENT, "u_zr", "u_n", calls=5) | plain("head"),
        time_varies=False,
    ),
    ZooModel(
        "manual-rnn",
        ManualRnn,
        features(5),
        {"w_x": INPUT * 5, "w_h": RECURRENT * 5, "w_y": ("feedforward",) * 5},
        time_varies=False,
    ),
    ZooModel(
        "manual-lstm-step",
        ManualLstmStep,
        lambda batch, time: tuple(floats(batch, n, seed=n) for n in (5, 8, 8)),
        plain("w_x", "w_h", "hidden", "head"),
        time_varies=False,
        notes="called once: nothing in the graph says that it is recurrent; h and c are frozen",
    ),
)

CELL_MODELS = CELLS + MANUAL
