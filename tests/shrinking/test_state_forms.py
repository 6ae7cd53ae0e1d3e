"""States without the layer's leading dimension, whose batch size the model also reads."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes import Magnitude


class FlatStates(nn.Module):
    """States are [batch, units]; the batch size comes from whatever input shares it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 6)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, time, features = x.shape
        y = self.encode(x.reshape(batch * time, features)).reshape(batch, time, 6)
        y, (h, c) = self.lstm(y, (h.unsqueeze(0), c.unsqueeze(0)))
        return self.head(y), h.squeeze(0), c.squeeze(0)


@pytest.mark.parametrize(("states", "outside"), [("keep", 8), ("shrink", 4)])
def test_states_of_two_dimensions(states: Literal["keep", "shrink"], outside: int) -> None:
    policy = fxprune.Policy([Magnitude(0.5)], states=states)
    example = (torch.randn(2, 5, 3), torch.randn(2, 8), torch.randn(2, 8))
    compact = fxprune.compile(FlatStates(), policy, example_inputs=example, progress=False)
    assert compact.module.get_parameter("lstm.weight_hh_l0").shape == (16, 4)
    x, (h, c) = torch.randn(3, 7, 3), torch.randn(2, 3, outside).unbind(0)
    result = compact.module(x, h, c)
    assert [tuple(r.shape) for r in result] == [(3, 7, 2), (3, outside), (3, outside)]
    notes = [note for note in compact.report.notes if note.startswith("state ")]
    assert [note.split(";")[0] for note in notes] == (
        []
        if states == "keep"
        else [
            f"state {name} is [any, 4] instead of [any, 8]"
            for name in ("h", "c", "output_1", "output_2")
        ]
    )
    if states == "keep":
        for actual, expected in zip(result, compact.masked(x, h, c), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


class Returned(nn.Module):
    """A layer whose final state is returned in several forms."""

    def __init__(self, form: Callable[[Tensor], tuple[Tensor, ...]], layers: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 8, layers, batch_first=True), nn.Linear(8, 2)
        self.form = form

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, h = self.gru(x)
        return self.head(y), *self.form(h)


@pytest.mark.parametrize(
    ("form", "layers"),
    [
        (lambda h: (h, h), 2),
        (lambda h: (h, h[-1]), 1),
        (lambda h: (h[-1], h[0], h), 2),
    ],
    ids=["twice", "slice", "slices"],
)
def test_a_state_is_returned_in_several_forms(
    form: Callable[[Tensor], tuple[Tensor, ...]], layers: int
) -> None:
    x = torch.randn(2, 5, 3)
    model = Returned(form, layers)
    compact = fxprune.compile(model, Magnitude(0.5), example_inputs=x, progress=False)
    assert compact.module.get_parameter("gru.weight_hh_l0").shape == (12, 4)
    x = torch.randn(3, 7, 3)
    for actual, expected in zip(compact.module(x), compact.masked(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    again = fxprune.compile(compact.module, Magnitude(0.5), example_inputs=x, progress=False)
    assert again.module.get_parameter("gru.weight_hh_l0").shape == (6, 2)


class Branched(nn.Module):
    """A layer with its state at the boundary, and a small residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 2)
        self.a, self.b = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        with torch.no_grad():
            self.a.weight.mul_(1e-3)
            self.b.weight.mul_(1e-3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.gru(x, h)
        return self.head(y + self.b(torch.relu(self.a(y)))), h


def test_what_is_compiled_again_keeps_its_constants() -> None:
    """The branch goes, so there are fewer tensors than when constants were named."""
    policy = [Magnitude(0.32, structure="connection", scope="global"), Magnitude(0.5)]
    example = (torch.randn(2, 5, 3), torch.randn(1, 2, 8))
    once = fxprune.compile(Branched(), policy, example_inputs=example, progress=False)
    assert "a.weight" not in dict(once.module.named_parameters())
    twice = fxprune.compile(once.module, policy, example_inputs=example, progress=False)
    assert twice.module.get_parameter("gru.weight_hh_l0").shape == (6, 2)
    assert set(once.program.tensors) - set(once.report.kept) < set(twice.program.tensors)
