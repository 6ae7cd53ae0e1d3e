"""Zoo: one recurrent module, in every form and read in every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo_model import Output, ZooModel, features, floats, plain, rnn


class Reader(nn.Module):
    """A recurrent module, a way of reading what it returns, and a linear head."""

    def __init__(self, rnn: nn.Module, size: int, read: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.rnn = rnn
        self.read = read
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor) -> Output:
        output, state = self.rnn(x)
        return self.head(self.read(output, state))


def whole(output: Tensor, state: Any) -> Tensor:
    return output


def last_step(output: Tensor, state: Any) -> Tensor:
    return output[:, -1]


def top_state(output: Tensor, h_n: Tensor) -> Tensor:
    return h_n[-1]


def top_cell(output: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    return state[1][-1]


def last_two(output: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([state[0][-2], state[0][-1]], dim=-1)


def flattened(output: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    return state[0].transpose(0, 1).reshape(output.shape[0], -1)  # [batch, layers * hidden]


def viewed(output: Tensor, h_n: Tensor) -> Tensor:
    states = h_n.view(2, 2, h_n.shape[1], h_n.shape[2])  # [layers, directions, batch, hidden]
    return torch.cat([states[-1, 0], states[-1, 1]], dim=-1)


def steps_and_states(output: Tensor, h_n: Tensor) -> Tensor:
    return output.mean(dim=1) + h_n.sum(dim=0)


FORMS = (
    ZooModel(
        "lstm",
        lambda: Reader(nn.LSTM(5, 8, batch_first=True), 8, whole),
        features(5),
        rnn("rnn") | plain("head"),
    ),
    ZooModel(
        "gru",
        lambda: Reader(nn.GRU(4, 9, batch_first=True), 9, whole),
        features(4),
        rnn("rnn") | plain("head"),
        batch=1,
    ),
    ZooModel(
        "rnn-tanh",
        lambda: Reader(nn.RNN(6, 7, batch_first=True), 7, whole),
        features(6),
        rnn("rnn") | plain("head"),
    ),
    ZooModel(
        "rnn-relu",
        lambda: Reader(nn.RNN(5, 10, nonlinearity="relu", batch_first=True), 10, last_step),
        features(5),
        rnn("rnn") | plain("head"),
    ),
    ZooModel(
        "lstm-two-layer",
        lambda: Reader(nn.LSTM(5, 7, num_layers=2, batch_first=True), 7, whole),
        features(5),
        rnn("rnn", layers=2) | plain("head"),
    ),
    ZooModel(
        "bilstm",
        lambda: Reader(nn.LSTM(5, 6, bidirectional=True, batch_first=True), 12, whole),
        features(5),
        rnn("rnn", both=True) | plain("head"),
    ),
    ZooModel(
        "bigru-two-layer",
        lambda: Reader(nn.GRU(4, 7, 2, bidirectional=True, batch_first=True), 14, whole),
        features(4),
        rnn("rnn", layers=2, both=True) | plain("head"),
    ),
    ZooModel(
        "birnn-time-major",
        lambda: Reader(nn.RNN(5, 6, bidirectional=True), 12, whole),
        lambda batch, time: (floats(time, batch, 5),),
        rnn("rnn", both=True) | plain("head"),
    ),
    ZooModel(
        "lstm-projected",
        lambda: Reader(nn.LSTM(5, 9, proj_size=4, batch_first=True), 4, whole),
        features(5),
        rnn("rnn", projected=True) | plain("head"),
    ),
    ZooModel(
        "lstm-projected-two-layer",
        lambda: Reader(nn.LSTM(6, 9, 2, proj_size=5, batch_first=True), 5, whole),
        features(6),
        rnn("rnn", layers=2, projected=True) | plain("head"),
    ),
    ZooModel(
        "bilstm-projected",
        lambda: Reader(nn.LSTM(5, 8, proj_size=3, bidirectional=True, batch_first=True), 6, whole),
        features(5),
        rnn("rnn", both=True, projected=True) | plain("head"),
    ),
    ZooModel(
        "gru-no-bias",
        lambda: Reader(nn.GRU(4, 7, 2, bias=False, batch_first=True), 7, last_step),
        features(4),
        rnn("rnn", layers=2) | plain("head"),
    ),
    ZooModel(
        "lstm-dropout",
        lambda: Reader(nn.LSTM(5, 8, 3, dropout=0.3, batch_first=True), 8, whole),
        features(5),
        rnn("rnn", layers=3) | plain("head"),
    ),
    ZooModel(
        "gru-unbatched",
        lambda: Reader(nn.GRU(5, 8), 8, whole),
        lambda batch, time: (floats(time, 5),),
        rnn("rnn") | plain("head"),
        batch=1,
        batch_varies=False,
        notes="2-D input [time, features]: there is no batch",
    ),
    ZooModel(
        "gru-final-state",
        lambda: Reader(nn.GRU(5, 9, 2, batch_first=True), 9, top_state),
        features(5),
        rnn("rnn", layers=2) | plain("head"),
    ),
    ZooModel(
        "lstm-final-cell",
        lambda: Reader(nn.LSTM(5, 7, bias=False, batch_first=True), 7, top_cell),
        features(5),
        rnn("rnn") | plain("head"),
    ),
    ZooModel(
        "bilstm-final-states",
        lambda: Reader(nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True), 12, last_two),
        features(5),
        rnn("rnn", layers=2, both=True) | plain("head"),
    ),
    ZooModel(
        "lstm-flattened-states",
        lambda: Reader(nn.LSTM(5, 8, 2, batch_first=True), 16, flattened),
        features(5),
        rnn("rnn", layers=2) | plain("head"),
    ),
    ZooModel(
        "bigru-viewed-states",
        lambda: Reader(nn.GRU(4, 6, 2, bidirectional=True, batch_first=True), 12, viewed),
        features(4),
        rnn("rnn", layers=2, both=True) | plain("head"),
    ),
    ZooModel(
        "gru-summed-states",
        lambda: Reader(nn.GRU(5, 8, 2, batch_first=True), 8, steps_and_states),
        features(5),
        rnn("rnn", layers=2) | plain("head"),
        notes="summing over layers couples unit k of both layers",
    ),
    ZooModel(
        "bare-lstm",
        lambda: nn.LSTM(5, 8, batch_first=True),
        features(5),
        rnn(""),
        prunable=False,
        notes="the outputs of all steps leave the model, so every unit is frozen",
    ),
    ZooModel(
        "bare-gru-two-layer",
        lambda: nn.GRU(5, 7, num_layers=2),
        lambda batch, time: (floats(time, batch, 5),),
        rnn("", layers=2),
        notes="layer 0 leaves the model by its final state only",
    ),
)
