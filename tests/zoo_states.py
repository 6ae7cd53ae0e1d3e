"""Zoo: initial and final states at the boundary of the model, and packed sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.zoo_model import Inputs, Output, ZooModel, features, floats, plain, rnn

# ----------------------------------------------------------------------------------------- states


class LstmStates(nn.Module):
    """Initial states given, final states returned."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.rnn = lstm
        self.head = nn.Linear(lstm.proj_size or lstm.hidden_size, 3)

    def forward(self, x: Tensor, h_0: Tensor, c_0: Tensor) -> Output:
        output, (h_n, c_n) = self.rnn(x, (h_0, c_0))
        return self.head(output), h_n, c_n


class GruState(nn.Module):
    """An initial state given and, on request, the final state returned."""

    def __init__(self, rnn: nn.GRU | nn.RNN, size: int, *, returns_state: bool) -> None:
        super().__init__()
        self.rnn = rnn
        self.returns_state = returns_state
        self.head = nn.Linear(size, 3)

    def forward(self, x: Tensor, h_0: Tensor) -> Output:
        output, h_n = self.rnn(x, h_0)
        return (self.head(output), h_n) if self.returns_state else self.head(output)


class LearnedLstmState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h_0 = nn.Parameter(torch.randn(1, 1, 8))
        self.c_0 = nn.Parameter(torch.randn(1, 1, 8))
        self.rnn = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        batch = x.shape[0]
        state = (self.h_0.expand(-1, batch, -1).contiguous(), self.c_0.repeat(1, batch, 1))
        return self.head(self.rnn(x, state)[0])


class LearnedGruState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h_0 = nn.Parameter(torch.randn(2, 7))
        self.rnn = nn.GRU(4, 7, num_layers=2)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        h_0 = self.h_0.unsqueeze(1).expand(2, x.shape[1], 7).contiguous()
        output, h_n = self.rnn(x, h_0)
        return self.head(output), h_n


def with_states(
    size: int, layers: int, *widths: int, time_major: bool = False
) -> Callable[[int, int], Inputs]:
    """A sequence and one state [layers, batch, width] for every width."""

    def inputs(batch: int, time: int) -> Inputs:
        x = floats(batch, time, size)
        states = (floats(layers, batch, width, seed=k) for k, width in enumerate(widths, 1))
        return (x.transpose(0, 1).contiguous() if time_major else x, *states)

    return inputs


STATES = (
    ZooModel(
        "bigru-state-in",
        lambda: GruState(
            nn.GRU(5, 6, bidirectional=True, batch_first=True), 12, returns_state=False
        ),
        with_states(5, 2, 6),
        rnn("rnn", both=True) | plain("head"),
    ),
    ZooModel(
        "lstm-states-in-out",
        lambda: LstmStates(nn.LSTM(5, 9, 2, batch_first=True)),
        with_states(5, 2, 9, 9),
        rnn("rnn", layers=2) | plain("head"),
    ),
    ZooModel(
        "rnn-state-in-out",
        lambda: GruState(nn.RNN(4, 7), 7, returns_state=True),
        with_states(4, 1, 7, time_major=True),
        rnn("rnn") | plain("head"),
    ),
    ZooModel(
        "lstm-projected-states",
        lambda: LstmStates(nn.LSTM(5, 8, proj_size=3, batch_first=True)),
        with_states(5, 1, 3, 8),
        rnn("rnn", projected=True) | plain("head"),
    ),
    ZooModel(
        "lstm-learned-states",
        LearnedLstmState,
        features(5),
        rnn("rnn") | plain("head"),
    ),
    ZooModel(
        "gru-learned-state",
        LearnedGruState,
        lambda batch, time: (floats(time, batch, 4),),
        rnn("rnn", layers=2) | plain("head"),
    ),
)

# ----------------------------------------------------------------------------------------- packed


class Packed(nn.Module):
    """Packs by a tensor of lengths, runs the recurrent module, and unpacks for a linear head."""

    def __init__(
        self,
        rnn: nn.Module,
        size: int,
        *,
        enforce_sorted: bool = False,
        full_length: bool = False,
        padding_value: float = 0.0,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(size, 3)
        self.enforce_sorted = enforce_sorted
        self.full_length = full_length
        self.padding_value = padding_value
        self.batch_first = batch_first

    def forward(self, x: Tensor, lengths: Tensor) -> Output:
        packed = pack_padded_sequence(x, lengths, self.batch_first, self.enforce_sorted)
        output, _ = pad_packed_sequence(
            self.rnn(packed)[0],
            self.batch_first,
            self.padding_value,
            x.shape[int(self.batch_first)] if self.full_length else None,
        )
        return self.head(output)


class PackedFinalState(nn.Module):
    """Reads only the final states, which are in the original order of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Output:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, h_n = self.rnn(packed)
        return self.head(h_n.squeeze(0))


class PackedStates(nn.Module):
    """Initial states given, final states and lengths returned."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor, lengths: Tensor, h_0: Tensor, c_0: Tensor) -> Output:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, (h_n, c_n) = self.rnn(packed, (h_0, c_0))
        output, sizes = pad_packed_sequence(packed, batch_first=True)
        return self.head(output), h_n, c_n, sizes


def lengths_for(batch: int, time: int, *, slack: int = 0) -> Tensor:
    """Lengths from 1 to ``time - slack``, unsorted, the longest in the middle of the batch."""
    top = max(1, time - slack)
    return torch.tensor([1 + (top - 1 + 2 * (k - batch // 2)) % top for k in range(batch)])


def with_lengths(
    size: int, *, sort: bool = False, slack: int = 0, time_major: bool = False
) -> Callable[[int, int], Inputs]:
    """A sequence and its lengths; ``slack`` steps at the end that no sequence reaches."""

    def inputs(batch: int, time: int) -> Inputs:
        lengths = lengths_for(batch, time, slack=slack)
        lengths = lengths.sort(descending=True).values if sort else lengths
        x = floats(batch, time, size)
        return (x.transpose(0, 1).contiguous() if time_major else x, lengths)

    return inputs


def packed_with_states(batch: int, time: int) -> Inputs:
    states = (floats(1, batch, 7, seed=1), floats(1, batch, 7, seed=2))
    return (floats(batch, time, 4), lengths_for(batch, time), *states)


PACKED = (
    ZooModel(
        "packed-gru-unsorted",
        lambda: Packed(nn.GRU(5, 7, batch_first=True), 7),
        with_lengths(5, slack=1),
        rnn("rnn") | plain("head"),
        batch=3,
        notes="no sequence is as long as the input: the output's time is the longest length",
    ),
    ZooModel(
        "packed-lstm-total-length",
        lambda: Packed(nn.LSTM(4, 9, batch_first=True), 9, full_length=True, padding_value=-1.5),
        with_lengths(4, slack=1),
        rnn("rnn") | plain("head"),
        batch=3,
        notes="the padding value meets the weights of the head: a constant that is not 0",
    ),
    ZooModel(
        "packed-rnn-sorted",
        lambda: Packed(nn.RNN(5, 6), 6, enforce_sorted=True, padding_value=0.5, batch_first=False),
        with_lengths(5, sort=True, time_major=True),
        rnn("rnn") | plain("head"),
        batch=3,
    ),
    ZooModel(
        "packed-bilstm-two-layer",
        lambda: Packed(nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True), 12),
        with_lengths(5),
        rnn("rnn", layers=2, both=True) | plain("head"),
        batch=4,
    ),
    ZooModel(
        "packed-gru-final-state",
        PackedFinalState,
        with_lengths(5),
        rnn("rnn") | plain("head"),
        batch=3,
    ),
    ZooModel(
        "packed-lstm-states",
        PackedStates,
        packed_with_states,
        rnn("rnn") | plain("head"),
        batch=3,
    ),
)

STATES_AND_PACKED = STATES + PACKED
