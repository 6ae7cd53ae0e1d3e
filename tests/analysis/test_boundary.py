"""Which results are states at the boundary: those a step leaves behind, not those in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.analysis.boundary import find_boundary

Step = Callable[[Any, Tensor, Any, int], Any]


class Loop(nn.Module):
    """Three steps from zeros, and what is returned of their states."""

    def __init__(self, step: Step, returned: Callable[[list[Any]], Any], **modules: Any) -> None:
        super().__init__()
        self.step, self.returned = step, returned
        self.parts = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Any:
        """Returns whatever is asked for."""
        state, states = None, []
        for t in range(3):
            state = self.step(self.parts, x[:, t], state, t)
            states.append(state)
        return self.returned(states)


def gru(m: Any, x: Tensor, h: Any, _: int) -> Any:
    return m["cell"](x, h)


def lstm(m: Any, x: Tensor, state: Any, _: int) -> Any:
    return m["cell"](x, state)


def untied(m: Any, x: Tensor, h: Any, t: int) -> Any:
    return m[f"cell{t}"](x, h)


def dropped(m: Any, x: Tensor, h: Any, _: int) -> Any:
    return m["cell"](x, None if h is None else m["drop"](m["mix"](h)))


def chunks(m: Any, x: Tensor, h: Any, _: int) -> Any:
    return m["cell"](x.unsqueeze(1), h)[1]


CELL: dict[str, Any] = {"cell": nn.GRUCell(3, 4)}


@pytest.mark.parametrize(
    ("model", "free", "states"),
    [
        (Loop(gru, lambda s: torch.stack(s, 1), **CELL), False, 0),
        (Loop(gru, lambda s: (torch.stack(s, 1), s[-1]), **CELL), False, 1),
        (Loop(gru, lambda s: (s[0], s[-1]), **CELL), False, 1),
        (Loop(gru, lambda s: s[-1], **CELL), True, 1),
        (Loop(gru, lambda s: (s[-1], s[-1]), **CELL), True, 1),
        (Loop(lstm, lambda s: torch.stack([c for _, c in s]), cell=nn.LSTMCell(3, 4)), False, 0),
        (Loop(lstm, lambda s: s[-1], cell=nn.LSTMCell(3, 4)), True, 2),
        (
            Loop(untied, torch.stack, **{f"cell{t}": nn.GRUCell(3, 4) for t in range(3)}),
            False,
            0,
        ),
        (Loop(dropped, torch.stack, drop=nn.Dropout(), mix=nn.Linear(4, 4), **CELL), False, 0),
        (Loop(chunks, torch.cat, cell=nn.GRU(3, 4, batch_first=True)), False, 0),
        (Loop(chunks, lambda s: s[-1], cell=nn.GRU(3, 4, batch_first=True)), True, 1),
    ],
    ids=[
        *("steps", "steps-and-last", "first-and-last", "last", "last-twice", "lstm-steps"),
        *("lstm-last", "untied", "passed-through-weights", "chunks", "last-chunk"),
    ],
)
def test_states_in_between_are_features(model: nn.Module, free: bool, states: int) -> None:
    program = fxprune.trace(model.eval(), torch.randn(2, 3, 3))
    assert len(find_boundary(program).final_states) == states
    neurons = analyze(program)
    group = next(g for g in neurons.groups if g.recurrent)
    assert bool(group.free.all()) is free
    assert group.reason == ("" if free else "output of the model")
    assert sum(r.kind == "state" for r in neurons.readers) == states


class Stacked(nn.Module):
    """Two cells called once: the lower one's state is the upper one's input."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.GRUCell(3, 4), nn.GRUCell(4, 4)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """States are [2, batch, 4]."""
        h = self.lower(x, states[0])
        return torch.stack([h, self.upper(h, states[1])])


def test_cells_called_once_leave_states() -> None:
    program = fxprune.trace(Stacked(), (torch.randn(2, 3), torch.randn(2, 2, 4)))
    boundary = find_boundary(program)
    assert [n.name for n in boundary.final_states] == ["gru_cell", "gru_cell_1"]
    assert {n.name for n in boundary.between} == {"stack"}
    assert analyze(program).group("lower").free.all()


class Shapes(nn.Module):
    """The second cell begins with zeros of the first one's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRUCell(3, 4), nn.GRUCell(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two states."""
        h = self.first(x)
        return h, self.second(x, h.new_zeros(h.shape))


def test_a_later_step_of_the_same_shape_reads_no_state() -> None:
    assert len(find_boundary(fxprune.trace(Shapes(), torch.randn(2, 3))).final_states) == 2
