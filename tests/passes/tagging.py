"""A small tagger and its training, for tests of passes that train."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.contract import Context, Facts, Pass
from fxprune.pipeline import Outcome, run_passes
from fxprune.program import Program
from fxprune.training import Task

__all__ = [
    "BATCHES",
    "EXAMPLE",
    "WEIGHTS",
    "KilledError",
    "KilledLoss",
    "Tagger",
    "check_that_it_continues",
    "make_task",
    "momentum",
    "mse",
    "prune",
    "tagger",
]

EXAMPLE = torch.zeros(4, 2, 4)
BATCHES = [torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
WEIGHTS = {"stem.weight": 24, "rnn.weight_ih_l0": 90, "rnn.weight_hh_l0": 75, "head.weight": 10}
"""Those of a tagger of one layer, and how many connections each holds."""


class Tagger(nn.Module):
    """Linear, GRU, Linear."""

    def __init__(self, units: int = 5, layers: int = 1) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.rnn = nn.GRU(6, units, num_layers=layers)
        self.head = nn.Linear(units, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [time, batch, 4] to [time, batch, 2]."""
        return self.head(self.rnn(torch.tanh(self.stem(x)))[0])  # type: ignore[no-any-return]


def tagger(units: int = 5, layers: int = 1) -> Tagger:
    """The same one each time."""
    torch.manual_seed(0)
    return Tagger(units, layers)


def mse(model: nn.Module, batch: Tensor) -> Tensor:
    return functional.mse_loss(model(batch), batch[..., :2])


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Moves what is masked, where nobody minds."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def make_task(**options: Any) -> Task:
    """Four epochs of eight batches."""
    given: dict[str, Any] = {
        "loss": mse,
        "train": BATCHES,
        "validate": lambda m: float(mse(m, BATCHES[0])),
        "goal": "min",
        "optimizer": momentum,
        "epochs": 4,
    }
    return Task(**(given | options))


def prune(
    program: Program, *passes: Pass, task: Task | None = None, protect: tuple[str, ...] = ()
) -> Outcome:
    """Runs passes on a program, as ``compile`` does."""
    return run_passes(program, passes, facts=Facts(program, Context(task, protect)))


class KilledError(Exception):
    """What ends a training in the middle."""


class KilledLoss:
    """The loss, which raises an error at one call.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, call: int, error: type[BaseException] = KilledError) -> None:
        self._call, self._error = call, error
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self._call:
            raise self._error
        return mse(model, batch)


def check_that_it_continues(program: Program, chosen: Pass, folder: Path) -> None:
    """A run that was broken off in its third epoch ends as the unbroken one, bit for bit."""
    whole = prune(program, chosen, task=make_task()).program
    loss = KilledLoss(20)

    with pytest.raises(Exception, match="KilledError"):
        prune(program, chosen, task=make_task(loss=loss, checkpoint=folder))
    continued = prune(program, chosen, task=make_task(loss=loss, checkpoint=folder)).program
    assert loss.calls == 20 + 16  # two of four epochs were done
    assert continued.masks.same_as(whole.masks)
    for name, tensor in whole.tensors.items():
        assert torch.equal(continued.tensors[name], tensor)
