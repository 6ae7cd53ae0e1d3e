"""Dynamic dimensions are called batch and time where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.naming import dimension_names, symbol_names
from tests.small import PackedTagger, Tagger, TiedModel, frames


class Two(nn.Module):
    """Two inputs of different lengths."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Sums both."""
        return x.sum(1) + y.sum(1)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (Tagger(), frames(), {"x": {0: "batch", 1: "time"}}),
        (nn.GRU(3, 4), frames(5, 2), {"input": {0: "time", 1: "batch"}}),
        (
            Tagger(),
            (frames(), torch.zeros(1, 2, 6)),
            {"x": {0: "batch", 1: "time"}, "state": {1: "batch"}},
        ),
        (
            PackedTagger(),
            (frames(), torch.tensor([3, 5])),
            {"x": {0: "batch", 1: "time"}, "lengths": {0: "batch"}},
        ),
        (TiedModel(), torch.tensor([[1, 2]]), {"tokens": {0: "batch", 1: "time"}}),
        (nn.Linear(3, 4), torch.zeros(2, 3), {"input": {0: "batch"}}),
        (
            Two(),
            (torch.zeros(2, 5, 3), torch.zeros(2, 6, 3)),
            {
                "x": {0: "batch", 1: "x_1", 2: "x_2"},
                "y": {0: "batch", 1: "y_1", 2: "x_2"},
            },
        ),
    ],
    ids=["tagger", "gru", "state", "packed", "tokens", "linear", "two"],
)
def test_names(model: nn.Module, inputs: Any, expected: dict[str, dict[int, str]]) -> None:
    program = fxprune.trace(model, inputs)
    assert dimension_names(program) == expected
    names = list(symbol_names(program).values())
    assert len(names) == len(set(names))


def test_a_fixed_dimension_has_no_name() -> None:
    shapes = {"input": None}
    program = fxprune.trace(nn.Linear(3, 4), torch.zeros(2, 3), dynamic_shapes=shapes)
    assert dimension_names(program) == {"input": {}}
