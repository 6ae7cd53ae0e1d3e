"""The fit loop: trains a module on a task, whoever asks for it.

An epoch is: train on every batch, validate, keep the weights if they are the best so far, write a
checkpoint. A checkpoint holds everything that the next epoch depends on, so a run that was killed
replays the epoch it was in and ends bit for bit where the unbroken run does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxprune.errors import ConfigError, TrainingError
from fxprune.progress import Tracker, track
from fxprune.randomness import preserved_random_state, random_state, set_random_state
from fxprune.training.checkpoint import Checkpoint, architecture, digest, tensors_of
from fxprune.training.evaluate import evaluate
from fxprune.training.placement import kept_modes, loader_generators, moved, placed
from fxprune.training.step import Stepper, make_optimizer, make_scheduler, settings_of
from fxprune.training.task import Task

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Attributes:
        metric: of the weights that the module was left with.
        best_epoch: the epoch with the best metric; 0 stands for the weights before training.
        metrics: metric after each epoch; the first entry is that of the weights before training.
        epochs: epochs run, one less than ``metrics`` has entries.
        steps: optimizer steps.
        stopped_early: patience ran out before the epochs or steps did.
        seconds: time spent, over all the processes that worked on the run.
    """

    metric: float
    best_epoch: int
    metrics: tuple[float, ...]
    epochs: int
    steps: int
    stopped_early: bool
    seconds: float


def fit(
    module: nn.Module,
    task: Task,
    *,
    after_step: Callable[[], None] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    keep: Literal["best", "last"] = "best",
    progress: bool = True,
    name: str = "fine-tune",
) -> FitResult:
    """Train a module in place.

    The random state, the mode and the device of the module are afterwards as they were, also
    after an error; the gradients are None. After an error the weights are those it met.

    What ``after_step`` and ``penalty`` remember from step to step must be a parameter or buffer of
    the module, or a resumed run will not know it.

    Args:
        module: what to train: every parameter that requires a gradient.
        task: how.
        after_step: called after each optimizer step, without gradients, to put right what the
            step must not change: masked weights, which momentum and weight decay would revive.
        penalty: computes a scalar that is added to the loss of each batch.
        keep: leave the module with the "best" weights by the metric, those before training
            included, or with the "last" ones.
        progress: show a progress bar on a terminal.
        name: what the progress bar and the checkpoint file are called. Fits that share a
            checkpoint folder need different names.

    Returns:
        How it went.

    Raises:
        TrainingError: nothing to train, no batches, a loss that is no finite scalar or does not
            depend on the parameters, a metric that is no number, a checkpoint that cannot be
            written.
        ConfigError: the device is not there, or the checkpoint is of another run.
    """
    if keep not in ("best", "last"):
        raise ConfigError(f"keep must be 'best' or 'last', got {keep!r}")
    generators = loader_generators(task.train)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        placed(module, task.device) as device,
        kept_modes(module),
        preserved_random_state(task.seed, *generators),
    ):
        run = _Run(module, task, device, generators, after_step, penalty, keep, name)
        try:
            return run(progress)
        finally:
            module.zero_grad(set_to_none=True)


@dataclass
class _State:
    """What changes from epoch to epoch, beside the module, the optimizer and random numbers."""

    metrics: list[float] = field(default_factory=list)
    best_epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    finished: bool = False

    @property
    def epoch(self) -> int:
        return len(self.metrics) - 1


class _Run:
    """One run of the loop."""

    def __init__(
        self,
        module: nn.Module,
        task: Task,
        device: torch.device | None,
        generators: tuple[torch.Generator, ...],
        after_step: Callable[[], None] | None,
        penalty: Callable[[], Tensor] | None,
        keep: str,
        name: str,
    ) -> None:
        self.module, self.task, self.device, self.generators = module, task, device, generators
        self.keep, self.name = keep, name
        self.optimizer = make_optimizer(module, task)
        self.scheduler = make_scheduler(task, self.optimizer)
        self.stepper = Stepper(module, task, self.optimizer, self.scheduler, after_step, penalty)
        self.state = _State()
        self.best: dict[str, Tensor] = {}
        self.checkpoint: Checkpoint | None = None
        if task.checkpoint is not None:
            self.checkpoint = Checkpoint.open(task.checkpoint, name, self._identity())
        self.started = time.perf_counter()

    def __call__(self, progress: bool) -> FitResult:
        state = self.state
        if not self._resume():
            self._validate()
        total = self._total_steps()
        with track(self.name, total, enabled=progress, done=state.steps) as tracker:
            while not (state.finished or self._at_limit() or self._out_of_patience()):
                self._train(tracker)
                self._validate()
                self._save()
        if not state.finished:
            if self.keep == "best":
                self._load_weights(self.best)
            state.finished = True
            self._save()
        kept = state.best_epoch if self.keep == "best" else state.epoch
        return FitResult(
            metric=state.metrics[kept],
            best_epoch=state.best_epoch,
            metrics=tuple(state.metrics),
            epochs=state.epoch,
            steps=state.steps,
            stopped_early=not self._at_limit(),
            seconds=self._seconds(),
        )

    # the parts of an epoch

    def _train(self, tracker: Tracker) -> None:
        state, batches = self.state, 0
        where = f"{self.name}, epoch {state.epoch + 1}"
        self.module.train()
        for batch in self.task.train:
            if self.device is not None:
                batch = moved(batch, self.device)
            loss = self.stepper(batch, f"{where}, step {state.steps + 1}")
            batches += 1
            state.steps += 1
            tracker.advance(loss=loss, metric=state.metrics[-1])
            if state.steps == self.task.steps:
                break
        if not batches:
            raise TrainingError(
                f"{where}: Task.train gave no batches: it must give the same ones each "
                "time it is iterated, and at least one"
            )

    def _validate(self) -> None:
        state = self.state
        where = f"{self.name}, validation of epoch {state.epoch + 1}"
        state.metrics.append(evaluate(self.module, self.task, where=where))
        if not self.best or self.task.better(state.metrics[-1], state.metrics[state.best_epoch]):
            state.best_epoch = state.epoch
            self.best = {k: v.detach().clone() for k, v in tensors_of(self.module).items()}

    # where the run stands

    def _at_limit(self) -> bool:
        return self.state.epoch >= self.task.max_epochs or self.state.steps == self.task.steps

    def _out_of_patience(self) -> bool:
        waited = self.state.epoch - self.state.best_epoch
        return self.task.patience is not None and waited >= self.task.patience

    def _total_steps(self) -> float | None:
        batches = math.inf if self.task.batches is None else self.task.batches
        limit = math.inf if self.task.steps is None else self.task.steps
        total = min(limit, batches * self.task.max_epochs if self.task.max_epochs else 0)
        return None if math.isinf(total) else total

    def _seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self.started

    # checkpoints

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        progress = asdict(self.state) | {"seconds": self._seconds()}
        content: dict[str, Any] = {"progress": progress, "weights": tensors_of(self.module)}
        if not self.state.finished:
            content["best"] = self.best
            content["optimizer"] = self.optimizer.state_dict()
            content["scheduler"] = self.scheduler and self.scheduler.state_dict()
            content["random"] = random_state(*self.generators)
        self.checkpoint.save(content)

    def _resume(self) -> bool:
        content = None if self.checkpoint is None else self.checkpoint.load()
        if content is None:
            return False
        for key, value in content["progress"].items():
            setattr(self.state, key, value)
        self._load_weights(content["weights"])
        if not self.state.finished:
            self.best = content["best"]
            self.optimizer.load_state_dict(content["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(content["scheduler"])
            set_random_state(content["random"], *self.generators)
        return True

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors_of(self.module).items():
                tensor.copy_(weights[name])

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must agree on; the weights tell two fits of one model apart."""
        tensors = tensors_of(self.module)
        return {
            "tensors": ", ".join(f"{name}{list(t.shape)}" for name, t in tensors.items()),
            "architecture": architecture(self.module),
            "weights before training": digest(tensors),
            "device": str(self.device and self.device.type),
            "keep": self.keep,
        } | settings_of(self.task, self.optimizer, self.scheduler)
