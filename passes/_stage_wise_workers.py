"""Candidates of stage-wise pruning on any executor: threads, processes, other machines.

Threads work on buffers of this process. Other processes read the model from an archive, once, and
what a round changes from a file; both lie in a folder that they must be able to read: within the
task's checkpoint folder if it names one, else within the system's temporary one.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.archives import load, save_archive
from fxprune.errors import ConfigError, FxpruneError, PreconditionError
from fxprune.passes._stage_wise_evaluation import Counts, Local, Material, Pool, judge
from fxprune.program import Program
from fxprune.search.spreading import Spread, needs_pickle
from fxprune.training import Task

__all__ = ["Evaluator"]


class Evaluator:
    """Computes the metrics of candidates, by an executor as long as it lives.

    Args:
        program: the model, the masks it came with inserted as nodes.
        make: makes a module of it over tensors of its own.
        task: how to judge; the model is evaluated on its device.
        executor: None for this process.
        pass_name: for errors.
        name: of the run, for the folder; a killed run of that name leaves none behind.
    """

    def __init__(
        self,
        program: Program,
        make: Callable[[], nn.Module],
        task: Task,
        executor: Executor | None,
        pass_name: str,
        name: str,
    ) -> None:
        _remove_folders(task, name)
        self._local = Local(make, task)
        self._folder: TemporaryDirectory[str] | None = None
        self._spread = Spread[Counts, float](self._local, executor)
        self._round = 0
        if executor is not None and needs_pickle(executor):
            device = str(next(iter(program.tensors.values())).device)
            device = device if task.device == "auto" else str(task.device)
            self._remote = Remote("", "", task.validate, task.goal, task.seed, device)
            self._remote.check(pass_name)
            self._folder = _make_folder(task, name)
            path = Path(self._folder.name) / "model.pt2"
            try:
                _export(program, path, pass_name)
            except BaseException:
                self.close()
                raise
            self._remote = replace(self._remote, archive=str(path))

    @property
    def failure(self) -> str | None:
        """Why the executor was given up, in words; None as long as it was not."""
        return self._spread.failure

    def begin(self, material: Material) -> None:
        """Starts a round: candidates are made from this from now on."""
        self._local.material = material
        if self._folder is not None and self.failure is None:
            self._round += 1
            path = Path(self._folder.name) / f"round-{self._round}.pt"
            material.save(path)
            self._spread.remote = replace(self._remote, material=str(path))

    def __call__(
        self, candidates: Sequence[Counts], done: Callable[[], object] = lambda: None
    ) -> list[float]:
        """The metrics of candidates, in their order; ``done`` is called after each."""
        return self._spread(candidates, done)

    def close(self) -> None:
        """Removes the files made for other processes."""
        if self._folder is not None:
            self._folder.cleanup()


@dataclass(frozen=True)
class Remote:
    """Computes the metric of a candidate in another process; picklable if ``validate`` is.

    Attributes:
        archive: path of the model, without this pass's masks.
        material: path of what candidates are made from; a new one for each round.
        validate: the task's.
        goal: the task's.
        seed: the task's.
        device: where the model is evaluated.
    """

    archive: str
    material: str
    validate: Callable[[nn.Module], float]
    goal: Any
    seed: int
    device: str

    def __call__(self, counts: Counts) -> float:
        task = Task(_no_loss, (None,), self.validate, self.goal, seed=self.seed)
        with _one_thread(), _archived(self.archive, self.device).take() as buffer:
            buffer.write(_material(self.material), counts)
            return judge(buffer.module, task)

    def check(self, pass_name: str) -> None:
        """Refuses what cannot be sent to another process.

        Raises:
            PreconditionError: ``validate`` cannot be pickled.
        """
        try:
            pickle.dumps(self)
        except Exception as error:  # pickle raises whatever the object's methods do
            raise PreconditionError(
                f"Task.validate cannot be sent to the executor's processes ({error}). Make it a "
                "function at the top of a module, or use a ThreadPoolExecutor or no executor.",
                pass_name=pass_name,
            ) from error


def _export(program: Program, path: Path, pass_name: str) -> None:
    """Writes the model for other processes.

    Raises:
        PreconditionError: it cannot be written as an archive.
    """
    try:
        save_archive(program, path)
    except FxpruneError as error:
        raise PreconditionError(
            f"the model cannot be sent to the executor's processes ({error}). Use a "
            "ThreadPoolExecutor or no executor.",
            pass_name=pass_name,
        ) from error


def _make_folder(task: Task, name: str) -> TemporaryDirectory[str]:
    if task.checkpoint is not None:
        Path(task.checkpoint).mkdir(parents=True, exist_ok=True)
    return TemporaryDirectory(prefix=f"{name}-workers-", dir=task.checkpoint)


def _remove_folders(task: Task, name: str) -> None:
    if task.checkpoint is not None:
        for folder in Path(task.checkpoint).glob(f"{name}-workers-*"):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A forked process waits for ever for threads of its parent; and workers share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise ConfigError("a worker of stage-wise pruning evaluates and does not train")


# One of each per worker process: the model is read once, and the last round's file.


@lru_cache(maxsize=1)
def _archived(path: str, device: str) -> Pool:
    return Pool(lambda: load(path).module().to(device))


@lru_cache(maxsize=1)
def _material(path: str) -> Material:
    return Material.load(path)
