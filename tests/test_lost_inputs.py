"""A report says which inputs the outputs no longer follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.lost_inputs import lost_inputs
from fxprune.masking.insertion import insert_masks
from fxprune.passes import Magnitude
from fxprune.program import Program


class TwoInputs(nn.Module):
    """Tokens and features, each through a layer of their own; the flag only looks needed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.words = nn.GRU(4, 5)
        self.frames = nn.LSTM(3, 6)
        self.head = nn.Linear(11, 2)

    def forward(self, tokens: Tensor, x: Tensor, ignored: Tensor) -> Tensor:
        y, _ = self.words(self.embedding(tokens))
        z, _ = self.frames(x)
        scores: Tensor = self.head(torch.cat([y, z], -1))
        return scores + 0.0 * ignored.sum()


def inputs(time: int = 4, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.arange(time * batch).reshape(time, batch) % 9
    generator = torch.Generator().manual_seed(time)
    return tokens, torch.randn(time, batch, 3, generator=generator), torch.ones(3)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return fxprune.trace(TwoInputs().eval(), inputs())


def cut(program: Program, **masks: Tensor) -> tuple[str, ...]:
    named = {name.replace("__", "."): mask for name, mask in masks.items()}
    masked = replace(program, masks=program.masks.cut_connections(named))
    return lost_inputs(masked, insert_masks(masked, analyze(masked)).module())


FRAMES = {"frames__weight_ih_l0": torch.zeros(24, 3, dtype=torch.bool)}
WORDS = {"words__weight_ih_l0": torch.zeros(15, 4, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("masks", "lost"),
    [({}, ()), (FRAMES, ("x",)), (WORDS, ("tokens",)), (FRAMES | WORDS, ("tokens", "x"))],
)
def test_inputs_that_masks_cut_off(program: Program, masks: Any, lost: tuple[str, ...]) -> None:
    assert cut(program, **masks) == lost


def test_a_single_connection_is_enough(program: Program) -> None:
    one = FRAMES["frames__weight_ih_l0"].clone()
    one[12, 1] = True  # of the candidate, so that it counts
    assert cut(program, frames__weight_ih_l0=one) == ()


def test_each_state_counts_for_itself() -> None:
    class Stated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor, states: tuple[Tensor, Tensor]) -> Tensor:
            y: Tensor = self.head(self.rnn(x, states)[0])
            return y

    program = fxprune.trace(Stated(), (torch.ones(3, 2, 3), (torch.ones(1, 2, 4),) * 2))
    assert cut(program, rnn__weight_hh_l0=torch.zeros(16, 4, dtype=torch.bool)) == ("states_0",)


def test_the_report_tells() -> None:
    torch.manual_seed(0)
    compact = fxprune.compile(
        TwoInputs().eval(), Magnitude(1 - 1 / 252, "connection"), example_inputs=inputs()
    )
    note = "the outputs no longer change with x: too much was removed between them"
    assert note in compact.report.notes
    assert note in str(compact.report)
    usual = fxprune.compile(
        TwoInputs().eval(), Magnitude(0.5, "connection"), example_inputs=inputs()
    )
    assert usual.report.notes == ()
