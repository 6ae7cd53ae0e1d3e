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


X = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(4))
INPUTS = (torch.arange(8).reshape(4, 2), X, torch.ones(3))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return fxprune.trace(TwoInputs().eval(), INPUTS)


def cut(program: Program, masks: dict[str, Tensor]) -> tuple[str, ...]:
    masked = replace(program, masks=program.masks.cut_connections(masks))
    return lost_inputs(masked, insert_masks(masked, analyze(masked)).module())


FRAMES = {"frames.weight_ih_l0": torch.zeros(24, 3, dtype=torch.bool)}
WORDS = {"words.weight_ih_l0": torch.zeros(15, 4, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("masks", "lost"),
    [({}, ()), (FRAMES, ("x",)), (WORDS, ("tokens",)), (FRAMES | WORDS, ("tokens", "x"))],
)
def test_inputs_that_masks_cut_off(program: Program, masks: Any, lost: tuple[str, ...]) -> None:
    assert cut(program, masks) == lost


def test_a_single_connection_is_enough(program: Program) -> None:
    one = FRAMES["frames.weight_ih_l0"].clone()
    one[12, 1] = True  # of the candidate, so that it counts
    assert cut(program, {"frames.weight_ih_l0": one}) == ()


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
    none = torch.zeros(16, 4, dtype=torch.bool)
    assert cut(program, {"rnn.weight_hh_l0": none}) == ("states_0",)


def test_the_report_tells() -> None:
    torch.manual_seed(0)
    compact = fxprune.compile(
        TwoInputs().eval(), Magnitude(1 - 1 / 252, "connection"), example_inputs=INPUTS
    )
    note = "the outputs no longer change with x: too much was removed between them"
    assert note in compact.report.notes
    assert note in str(compact.report)
    usual = fxprune.compile(TwoInputs().eval(), Magnitude(0.5, "connection"), example_inputs=INPUTS)
    assert usual.report.notes == ()
