"""What was stacked only to be taken apart is connected directly; what is computed stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.tracing import recurrent
from tests.small import frames

aten = torch.ops.aten
Read = Callable[[Tensor], Tensor]


class States(nn.Module):
    """Reads the final states of two bidirectional layers, [4, batch, 3]."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        """Applies the reading."""
        return self.read(self.rnn(x)[1])


READS: dict[str, tuple[Read, bool]] = {
    "select": (lambda h: h[-1], True),
    "two": (lambda h: h[-1] + h[0], True),
    "cat": (lambda h: torch.cat([h[-2], h[-1]], 1), True),
    "unbind": (lambda h: torch.cat(h.unbind(0), 1), True),
    "iterate": (lambda h: torch.cat(list(h), -1), True),
    "view": (lambda h: h.view(2, 2, -1, 3)[1][0], True),
    "view-select-last": (lambda h: h.view(2, 2, -1, 3)[-1, -1], True),
    "slice-select": (lambda h: h[2:][1], True),
    "strided-slice": (lambda h: h[1::2][0], True),
    "slice": (lambda h: h[1:3], False),
    "slice-of-one": (lambda h: h[3:4].squeeze(0), True),
    "whole": (lambda h: h, False),
    "sum": (lambda h: h.sum(0), False),
    "other-dimension": (lambda h: h[:, 0], False),
}


@pytest.mark.parametrize("name", READS)
def test_reading_states(name: str) -> None:
    read, direct = READS[name]
    model = States(read).eval()
    program = fxprune.trace(model, frames())
    stacks = program.nodes(aten.stack.default)
    assert bool(stacks) is not direct
    for x in (frames(), frames(1, 3)):
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shaped", "target"),
    [
        (lambda x, y: x.flatten(0, 1).view_as(y), aten.view.default),
        (lambda x, y: x.flatten(0, 1).reshape_as(y), aten.reshape.default),
        (lambda x, y: x[:, :1].expand_as(y), aten.expand.default),
    ],
)
def test_the_shape_of_another_value_is_given_as_sizes(
    shaped: Callable[[Tensor, Tensor], Tensor], target: Any
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return shaped(x, self.layer(x)) * 2

    model = Model()
    program = fxprune.trace(model, frames())
    (node,) = program.nodes(target)
    assert node.args[1][-1] == 3  # type: ignore[index]
    for x in (frames(), frames(3, 7)):
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


def test_a_slice_stacks_only_its_part() -> None:
    program = fxprune.trace(States(lambda h: h[1:3]), frames())
    (stack,) = program.nodes(aten.stack.default)
    parts = stack.args[0]
    assert isinstance(parts, (list, tuple))
    assert len(parts) == 2


def test_what_nothing_reads_goes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4)
            self.unused = nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Tensor:
            y, (h, _) = self.rnn(x)
            self.unused(h)
            return y  # type: ignore[no-any-return]

    program = fxprune.trace(Model(), frames())
    assert not program.nodes(aten.linear.default)
    assert not program.nodes(aten.stack.default)
    assert "unused.weight" in program.tensors  # its name stays in the state dict


@pytest.mark.parametrize(
    "start",
    [
        lambda x: torch.zeros(1, x.shape[0], 4),
        lambda x: x.new_zeros(1, x.shape[0], 4),
        lambda x: torch.zeros(x.shape[0], 4).unsqueeze(0),
        lambda x: torch.zeros(1, 1, 4).expand(1, x.shape[0], 4).contiguous(),
        lambda x: torch.zeros(2, x.shape[0], 4)[:1],
    ],
)
def test_zeros_are_no_initial_state(start: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rnn(x, start(x))[0]
            return y

    model = Model()
    program = fxprune.trace(model, frames())
    (layer,) = program.nodes(recurrent.gru)
    assert layer.args[1] is None
    torch.testing.assert_close(program.module()(frames(3, 2)), model(frames(3, 2)))


def test_ones_are_an_initial_state() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rnn(x, torch.ones(1, x.shape[0], 4))[0]
            return y

    (layer,) = fxprune.trace(Model(), frames()).nodes(recurrent.gru)
    assert layer.args[1] is not None
