"""A fit that kills its own process at a chosen moment; run as a script or through runpy.

    killed_run.py FOLDER MOMENT...

For each moment a child process trains with checkpoints in FOLDER/MOMENT and sends itself SIGKILL
there. A moment is ``loss-N`` (the Nth computation of the loss), ``validate-N``, ``write-N`` (half
of the Nth checkpoint is on the disk) or ``saved-N`` (the Nth checkpoint is in its place).
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.training import FitResult, Task, fit

Reached = Callable[[str], None]


class Model(nn.Module):
    """Draws random numbers in training and keeps statistics in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.dropout(self.norm(self.rnn(x)[0][:, -1])))
        return out


def train(folder: Path | None, reached: Reached) -> tuple[Model, FitResult]:
    """Train the same model on the same data, telling ``reached`` about each moment."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 4, 3, generator=generator)
    y = torch.randint(2, (20,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Model()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        reached("loss")
        noise = random.random() + float(np.random.rand())
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * (1 + 0.1 * noise)

    def validate(model: nn.Module) -> float:
        reached("validate")
        return float(nn.functional.cross_entropy(model(x), y))

    # the order comes from a generator of the loader's own
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=generator)
    task = Task(
        loss,
        loader,
        validate,
        goal="min",
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
        epochs=3,
        clip=1.0,
        checkpoint=folder,
        seed=7,
    )
    mask = (torch.arange(6) % 2 == 0).float()

    @torch.no_grad()
    def after_step() -> None:
        model.head.weight.mul_(mask)

    after_step()
    return model, fit(model, task, after_step=after_step, progress=False)


def die_at(moment: str) -> Reached:
    """Kill this process at the moment, in the middle of writing if need be."""
    kind, number = moment.split("-")
    counts: dict[str, int] = {}

    def reached(what: str) -> None:
        counts[what] = counts.get(what, 0) + 1
        if what == kind and counts[what] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    save, replace = torch.save, os.replace

    def save_halves(content: object, file: Any) -> None:
        start = file.tell()
        save(content, file)
        size = file.tell() - start
        file.truncate(start + size // 2)
        file.flush()
        reached("write")
        file.seek(start)
        save(content, file)

    def replace_and_tell(source: Path, target: Path) -> None:
        replace(source, target)
        reached("saved")

    torch.save = save_halves  # type: ignore[assignment]
    os.replace = replace_and_tell  # type: ignore[assignment]
    return reached


def main(folder: str, *moments: str) -> None:
    torch.set_num_threads(1)  # no threads before the fork
    importlib.import_module("torch._dynamo")  # optimizers load it; once is enough
    for moment in moments:
        child = os.fork()
        if child == 0:
            train(Path(folder) / moment, die_at(moment))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(f"{moment}: the child ended with {status} instead of being killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
