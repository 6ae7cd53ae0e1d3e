"""MACs equal a count by hand, and torch's own where that sees them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fxprune.masking.macs import macs
from fxprune.tracing.tracer import trace

BATCH, TIME = 2, 5


class Convolutions(nn.Module):
    """Convolution, depthwise convolution, transposed convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.out = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 3, time] to [batch, 2 * time, 7]."""
        y: Tensor = self.up(self.depthwise(self.conv(x).relu()))
        return self.out(y.transpose(1, 2))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """One recurrent layer and nothing else."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Maps [time, batch, 3] to the outputs."""
        return self.layer(x)[0]  # type: ignore[no-any-return]


class Packed(nn.Module):
    """A GRU over a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Maps [time, batch, 3] and [batch] to the final state."""
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.layer(packed)[1]  # type: ignore[no-any-return]


class Cells(nn.Module):
    """A cell called in a loop over three steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [3, batch, 3] to the last output."""
        state: tuple[Tensor, Tensor] | None = None
        for step in range(3):
            state = self.cell(x[step], state)
        assert state is not None
        return state[0]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Calls the function."""
        return self.function(x)


def test_convolutions_as_by_hand_and_as_torch_counts() -> None:
    model, x = Convolutions(), torch.randn(BATCH, 3, TIME)
    by_hand = BATCH * TIME * (6 * 3 * 3 + 6 * 3 + 6 * 4 * 2 + 2 * 4 * 7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert macs(trace(model, x)) == by_hand == counter.get_total_flops() // 2


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.LSTM(3, 4), 4 * 4 * (3 + 4)),
        (nn.LSTM(3, 4, proj_size=2), 4 * 4 * (3 + 2) + 2 * 4),
        (nn.GRU(3, 4, bidirectional=True), 2 * 3 * 4 * (3 + 4)),
        (nn.GRU(3, 4, num_layers=2, bias=False), 3 * 4 * (3 + 4) + 3 * 4 * (4 + 4)),
        (nn.RNN(3, 4, nonlinearity="relu"), 4 * (3 + 4)),
    ],
    ids=["lstm", "projected-lstm", "bidirectional-gru", "stacked-gru", "rnn"],
)
def test_recurrent_layers_count_every_weight_once_a_step(layer: nn.Module, weights: int) -> None:
    program = trace(Recurrent(layer), torch.randn(TIME, BATCH, 3))
    assert macs(program) == TIME * BATCH * weights


def test_padded_steps_count() -> None:
    program = trace(Packed(), (torch.randn(TIME, BATCH, 3), torch.tensor([TIME, 2])))
    assert macs(program) == TIME * BATCH * 3 * 4 * (3 + 4)


def test_cells_count_once_a_call() -> None:
    program = trace(Cells(), torch.randn(3, BATCH, 3))
    assert macs(program) == 3 * BATCH * 4 * 4 * (3 + 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: functional.scaled_dot_product_attention(x, x, x), 2 * 2 * 3 * 3 * 4),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), 2 * 3 * 3 * 4),
        (lambda x: torch.einsum("bij,bkj,bkl->bil", x, x, x), 2 * (2 * 3 * 3 * 4)),
        (lambda x: functional.bilinear(x, x, torch.ones(5, 4, 4)), 2 * 3 * 5 * 4 * 4),
        (lambda x: x @ x[0, 0], 2 * 3 * 4),
        (lambda x: torch.addmv(x[0, :, 0], x[0], x[1, 0]), 3 * 4),
        (lambda x: torch.dot(x[0, 0], x[1, 0]), 4),
        (lambda x: (x * x + x).tanh().mean(-1), 0),
    ],
    ids=[
        "attention",
        "einsum",
        "einsum-of-three",
        "bilinear",
        "matrix-vector",
        "addmv",
        "dot",
        "pointwise",
    ],
)
def test_products_count_however_written(
    function: Callable[[Tensor], Tensor], expected: int
) -> None:
    assert macs(trace(Function(function), torch.randn(2, 3, 4))) == expected


def test_random_state_is_untouched() -> None:
    program = trace(Function(lambda x: functional.dropout(x, 0.5, True) * 0), torch.randn(2, 3))
    before = torch.get_rng_state()
    assert macs(program) == 0
    assert torch.equal(before, torch.get_rng_state())
