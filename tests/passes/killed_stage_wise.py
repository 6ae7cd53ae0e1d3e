"""A stage-wise pruning that kills its own process at a chosen moment; run as a script.

    killed_stage_wise.py FOLDER MOMENT...

For each moment a child process prunes with checkpoints in FOLDER/MOMENT and sends itself SIGKILL
there. Moments are those of ``tests/training/killed_run.py``.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.contract import Context, Facts
from fxprune.passes.stage_wise import StageWise
from fxprune.pipeline import Outcome, run_passes
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from fxprune.training import Task
from tests.training.killed_run import die_at

Reached = Callable[[str], None]
OPTIONS: dict[str, Any] = {  # the first round recovers, the next two do not
    "tolerance": 1.5,
    "relative": True,
    "rounds": 3,
    "population": 4,
    "generations": 3,
}


class Model(nn.Module):
    """A GRU that draws random numbers in training and keeps statistics in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.dropout(self.norm(self.rnn(x)[0][:, -1])))
        return out


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, 3, generator=generator)
    return x, (x.sum((1, 2)) > 0).long()


def traced() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return trace(Model().eval(), data()[0])


def make_task(folder: Path | None, reached: Reached) -> Task:
    x, y = data()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        reached("loss")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def validate(model: nn.Module) -> float:
        reached("validate")
        return float(nn.functional.cross_entropy(model(x), y))

    return Task(
        loss,
        [(x[:10], y[:10]), (x[10:], y[10:])],
        validate,
        "min",
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        epochs=3,
        checkpoint=folder,
        seed=7,
    )


def prune(program: Program, folder: Path | None, reached: Reached) -> Outcome:
    """Prune the same program on the same data, telling ``reached`` about each moment."""
    facts = Facts(program, Context(make_task(folder, reached)))
    return run_passes(program, [StageWise(**OPTIONS)], facts=facts)


def main(folder: str, *moments: str) -> None:
    torch.set_num_threads(1)  # no threads before the fork
    importlib.import_module("torch._dynamo")  # optimizers load it; once is enough
    program = traced()
    for moment in moments:
        child = os.fork()
        if child == 0:
            prune(program, Path(folder) / moment, die_at(moment))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(f"{moment}: the child ended with {status} instead of being killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
