"""Zoo: one module called several times, outputs that are fed back, states that are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo_model import (
    INPUT,
    RECURRENT,
    Inputs,
    Output,
    ZooModel,
    cell,
    features,
    floats,
    integers,
    plain,
    rnn,
    weights,
)


class Siamese(nn.Module):
    """One LSTM reads two sequences of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Output:
        left, _ = self.lstm(a)
        right, _ = self.lstm(b)
        return self.head((left - right).abs())


class InTwoParts(nn.Module):
    """One LSTM reads the first two steps, then the rest from where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 9, batch_first=True)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Output:
        first, state = self.lstm(x[:, :2])
        rest, _ = self.lstm(x[:, 2:], state)
        return self.head(torch.cat([first, rest], dim=1))


class SameGruTwice(nn.Module):
    """One GRU on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 7)
        self.gru = nn.GRU(7, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        once, _ = self.gru(self.stem(x))
        twice, _ = self.gru(once)
        return self.head(twice)


class SameLinearTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)
        self.hidden = nn.Linear(6, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Output:
        return self.head(torch.relu(self.hidden(self.block(torch.relu(self.block(x))))))


class IteratedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        h = self.stem(x)
        for _ in range(3):
            h = h + torch.tanh(self.block(h))
        return self.head(h)


AGAIN = (
    ZooModel(
        "lstm-siamese",
        Siamese,
        lambda batch, time: (floats(batch, time, 5, seed=1), floats(batch, time, 5, seed=2)),
        rnn("lstm", calls=2) | plain("head"),
    ),
    ZooModel(
        "lstm-in-two-parts",
        InTwoParts,
        features(4),
        rnn("lstm", calls=2) | plain("head"),
        valid_time=lambda time: time >= 3,
    ),
    ZooModel(
        "same-gru-twice",
        SameGruTwice,
        features(5),
        plain("stem") | rnn("gru", calls=2) | plain("head"),
        notes="the roles of a recurrent operation are fixed: weight_ih stays input",
    ),
    ZooModel(
        "same-linear-twice",
        SameLinearTwice,
        lambda batch, time: (floats(batch, 6),),
        weights(RECURRENT, "block", calls=2) | plain("hidden", "head"),
        time_varies=False,
        notes="the block's units are the model's inputs too, so they are frozen",
    ),
    ZooModel(
        "iterated-residual",
        IteratedResidual,
        features(5),
        weights(INPUT, "stem") | weights(RECURRENT, "block", calls=3) | plain("head"),
        notes="the stem's output is a term of the sum that the second use of the block reads",
    ),
)

# ------------------------------------------------------- feedback and computed states


class Forecaster(nn.Module):
    """Three values of a series are forecast, each from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Output:
        h = c = x.new_zeros(x.shape[0], 8)
        outputs = []
        for _ in range(3):
            h, c = self.cell(x, (h, c))
            x = x + self.head(h)
            outputs.append(x)
        return torch.stack(outputs, dim=1)


class Captioner(nn.Module):
    """The initial states are computed from an image's features."""

    def __init__(self) -> None:
        super().__init__()
        self.to_h = nn.Linear(6, 8)
        self.to_c = nn.Linear(6, 8)
        self.embedding = nn.Embedding(13, 7)
        self.lstm = nn.LSTM(7, 8, batch_first=True)
        self.head = nn.Linear(8, 13)

    def forward(self, image: Tensor, words: Tensor) -> Output:
        state = (torch.tanh(self.to_h(image)).unsqueeze(0), self.to_c(image).unsqueeze(0))
        return self.head(self.lstm(self.embedding(words), state)[0])


def image_and_words(batch: int, time: int) -> Inputs:
    return floats(batch, 6), integers(13, batch, time)


FED = (
    ZooModel(
        "forecaster",
        Forecaster,
        lambda batch, time: (floats(batch, 5),),
        cell("cell", calls=3) | weights(RECURRENT, "head", calls=3),
        time_varies=False,
        notes="the head writes into the next step's input, so its next use depends on it",
    ),
    ZooModel(
        "captioner",
        Captioner,
        image_and_words,
        weights(INPUT, "to_h", "to_c") | plain("embedding") | rnn("lstm") | plain("head"),
        notes="what computes an initial state reaches the units without another block",
    ),
)

LOOPS = AGAIN + FED
