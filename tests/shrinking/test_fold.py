"""Neurons that are the same everywhere go into the biases of their readers, and no others do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.compact import Compact
from fxprune.program import Program
from fxprune.shrinking.fold import find_constants, fold_constants


class Chain(nn.Module):
    """A linear map, something between, and a reader of it."""

    def __init__(self, between: Callable[[Tensor], Tensor], reader: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.reader = nn.Linear(3, 6), between, reader

    def forward(self, x: Tensor) -> Tensor:
        """Maps [time, batch, 3]."""
        y = self.reader(self.between(self.first(x)))
        made: Tensor = y[0] if isinstance(y, tuple) else y
        return made


class Spatial(nn.Module):
    """Two convolutions; the second pads."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 6, 1)
        self.second = nn.Conv1d(6, 4, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 3, time]."""
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Positioned(nn.Module):
    """What is constant of the first map differs from position to position of the sum."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.offsets = nn.Parameter(torch.randn(6, 6) if across else torch.randn(5, 1, 6))
        self.across = across

    def forward(self, x: Tensor) -> Tensor:
        """Maps [5, batch, 3]."""
        y = self.first(x)
        if self.across:
            return torch.logsumexp(y[..., None] + self.offsets, -2)
        return self.head(y + self.offsets)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A recurrent layer and a reader of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.head = layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [time, batch, 3] to [time, batch, 2]."""
        return self.head(self.first(x)[0])  # type: ignore[no-any-return]


def silenced(model: nn.Module, rows: dict[str, list[int]]) -> nn.Module:
    """The model itself with those rows of weights at zero: what it should compute."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, which in rows.items():
            made.get_parameter(name)[which] = 0
    return made


def masked(model: nn.Module, x: Tensor, rows: dict[str, list[int]]) -> Program:
    program = fxprune.trace(model, x)
    kept = {n: torch.ones(program.tensors[n].shape, dtype=torch.bool) for n in rows}
    for name, which in rows.items():
        kept[name][which] = False
    return replace(program, masks=program.masks.cut_connections(kept))


def compiled(model: nn.Module, x: Tensor, rows: dict[str, list[int]]) -> Compact:
    """Compiles, and checks it against the model with zeros."""
    compact = fxprune.compile(masked(model.eval(), x, rows), [], progress=False)
    expected = silenced(model, rows)(x)
    torch.testing.assert_close(compact.module(x), expected, rtol=0, atol=1e-6)
    return compact


READERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 2),
    "lstm": lambda: nn.LSTM(6, 4),
    "gru": lambda: nn.GRU(6, 4, bidirectional=True),
    "rnn": lambda: nn.RNN(6, 4, num_layers=2),
}


@pytest.mark.parametrize("between", [torch.tanh, lambda y: 2 * torch.sigmoid(y) - y])
@pytest.mark.parametrize("reader", READERS)
def test_constants_go_into_the_bias_of_the_reader(
    reader: str, between: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model = Chain(between, READERS[reader]())
    compact = compiled(model, torch.randn(5, 2, 3), {"first.weight": [1, 4]})
    assert compact.module.get_parameter("first.weight").shape == (4, 3)


@pytest.mark.parametrize(
    ("between", "reader"),
    [
        (nn.BatchNorm1d(5), nn.Linear(6, 2)),  # its statistics are those of the batch in training
        (nn.Dropout(0.1), nn.Linear(6, 2)),
        (torch.tanh, nn.Linear(6, 2, bias=False)),
        (torch.tanh, nn.LSTM(6, 4, bias=False)),
    ],
    ids=["batch norm", "dropout", "linear without bias", "lstm without bias"],
)
def test_constants_stay_where_nothing_takes_them(
    between: Callable[[Tensor], Tensor], reader: nn.Module
) -> None:
    torch.manual_seed(0)
    compact = compiled(Chain(between, reader), torch.randn(5, 5, 3), {"first.weight": [1, 4]})
    assert compact.module.get_parameter("first.weight").shape == (6, 3)


@pytest.mark.parametrize(("padding", "left"), [(0, 4), (1, 6)])
def test_a_padded_convolution_takes_zeros_only(padding: int, left: int) -> None:
    torch.manual_seed(0)
    model, x = Spatial(padding), torch.randn(2, 3, 7)
    compact = compiled(model, x, {"first.weight": [0, 5]})
    assert compact.module.get_parameter("first.weight").shape[0] == left
    with torch.no_grad():
        model.first.bias[[0, 5]] = 0  # type: ignore[index]
    compact = compiled(model, x, {"first.weight": [0, 5]})
    assert compact.module.get_parameter("first.weight").shape[0] == 4


@pytest.mark.parametrize("across", [False, True])
def test_what_differs_by_position_is_no_constant(across: bool) -> None:
    torch.manual_seed(0)
    compact = compiled(Positioned(across), torch.randn(5, 2, 3), {"first.weight": [1, 4]})
    assert compact.module.get_parameter("first.weight").shape == (6, 3)


@pytest.mark.parametrize(("layer", "gate"), [(nn.LSTM, 2), (nn.GRU, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_unit_without_a_candidate_stays_zero_unless_a_bias_moves_it(
    layer: Callable[..., nn.Module], gate: int, bias: bool
) -> None:
    torch.manual_seed(0)
    model = Recurrent(layer(3, 4, bias=bias))
    row = [gate * 4 + 1]
    rows = {"first.weight_ih_l0": row, "first.weight_hh_l0": row}
    compact = compiled(model, torch.randn(5, 2, 3), rows)
    assert compact.module.get_parameter("head.weight").shape == (2, 4 if bias else 3)


def test_a_reader_that_is_used_twice_takes_nothing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x)) * self.head(self.second(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    compact = compiled(Twice(), torch.randn(5, 2, 3), {"first.weight": [1, 4]})
    assert compact.module.get_parameter("first.weight").shape == (6, 3)


def test_constants_are_found_by_value() -> None:
    torch.manual_seed(0)
    model = Chain(torch.relu, nn.Linear(6, 2))
    program = masked(model, torch.randn(5, 2, 3), {"first.weight": [1, 4]})
    found = find_constants(program, analyze(program))
    values = {node.name: v.flatten()[[1, 4]] for node, v in found.items()}
    bias = model.first.bias.detach()[[1, 4]].double()
    assert torch.equal(values["linear"], bias) and torch.equal(values["relu"], bias.relu())
    assert all(int(v.isnan().sum()) == 4 for v in found.values())


def test_without_masked_connections_it_is_the_program_itself() -> None:
    program = fxprune.trace(Chain(torch.relu, nn.Linear(6, 2)), torch.randn(5, 2, 3))
    assert fold_constants(program, analyze(program)) is program
