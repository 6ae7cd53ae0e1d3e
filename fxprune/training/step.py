"""One optimizer step: loss, penalty, gradient, clipping, update; and the checks on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fxprune.errors import ConfigError, TrainingError
from fxprune.training.task import Task

__all__ = ["Stepper", "make_optimizer", "make_scheduler", "settings_of"]


def make_optimizer(module: nn.Module, task: Task) -> Optimizer:
    """A fresh optimizer of the parameters that require a gradient.

    Raises:
        TrainingError: there are none.
        ConfigError: ``task.optimizer`` does not make an optimizer that can be used here.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError(
            "the module has no parameter that requires a gradient, so there is nothing to train: "
            "set requires_grad on some, or leave the task out"
        )
    optimizer = task.optimizer(parameters)
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            f"Task.optimizer made a {type(optimizer).__name__}: it must make a "
            "torch.optim.Optimizer whose step needs no closure, such as "
            "lambda p: torch.optim.SGD(p, lr=0.1)"
        )
    given = {id(parameter) for parameter in parameters}
    if any(id(p) not in given for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "Task.optimizer made an optimizer of other parameters than it was given: what is "
            "trained is a traced copy. Write lambda p: torch.optim.SGD(p, lr=0.1), not one that "
            "names your model"
        )
    return optimizer


def make_scheduler(task: Task, optimizer: Optimizer) -> LRScheduler | None:
    """A fresh scheduler of the optimizer's learning rates; None if the task has none.

    Raises:
        ConfigError: ``task.scheduler`` does not make one that can be used here.
    """
    if task.scheduler is None:
        return None
    scheduler = task.scheduler(optimizer)
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            f"Task.scheduler made a {type(scheduler).__name__}: it must make a scheduler of "
            "torch.optim.lr_scheduler that is stepped without a metric, such as "
            "lambda o: CosineAnnealingLR(o, 1000)"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError(
            "Task.scheduler made a scheduler of another optimizer than it was given: write "
            "lambda o: CosineAnnealingLR(o, 1000), with that o"
        )
    return scheduler


def settings_of(
    task: Task, optimizer: Optimizer, scheduler: LRScheduler | None = None
) -> dict[str, str]:
    """What a checkpoint must agree on of how a model is trained, one text per aspect."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    options = ("goal", "epochs", "steps", "clip", "patience", "seed")
    found = {option: str(getattr(task, option)) for option in options} | {
        "optimizer": f"{type(optimizer).__name__} {groups}",
        "batches": str(task.batches),
    }
    return found if scheduler is None else found | {"scheduler": _text(scheduler)}


def _text(scheduler: LRScheduler) -> str:
    """Its class and the numbers in its state; functions have no text that lasts."""
    numbers = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | str)}
    return f"{type(scheduler).__name__} {numbers}"


@dataclass(frozen=True)
class Stepper:
    """Trains a module on one batch at a time.

    Attributes:
        module: trained in place.
        task: gives loss and clipping.
        optimizer: of the module's parameters.
        scheduler: of the optimizer's learning rates, None if they are constant.
        after_step: called after each update, without gradients.
        penalty: computes what is added to the loss.
    """

    module: nn.Module
    task: Task
    optimizer: Optimizer
    scheduler: LRScheduler | None
    after_step: Callable[[], None] | None
    penalty: Callable[[], Tensor] | None

    def __call__(self, batch: Any, where: str) -> float:
        """Take one step; returns the loss, penalty included.

        Args:
            batch: on the module's device.
            where: names the moment in an error.

        Raises:
            TrainingError: the loss is no finite scalar, or does not depend on the parameters;
                the weights are then as they were before the step. Or the scheduler has ended.
        """
        loss = _scalar(self.task.loss(self.module, batch), f"{where}: Task.loss")
        if self.penalty is not None:
            loss = loss + _scalar(self.penalty(), f"{where}: the penalty")
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"{where}: the loss is {value}: lower the learning rate, set Task.clip, or look "
                "for bad values in this batch"
            )
        if not loss.requires_grad:
            raise TrainingError(
                f"{where}: the loss does not depend on the parameters: compute it from the "
                "model's outputs, without detach, item or no_grad"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in trained):
            raise TrainingError(
                f"{where}: the loss does not depend on the parameters that are trained: compute "
                "it from the module that Task.loss is given, not from one of your own"
            )
        if self.task.clip is not None:
            nn.utils.clip_grad_norm_(trained, self.task.clip)
        self.optimizer.step()
        self._schedule(where)
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step()
        return value

    def _schedule(self, where: str) -> None:
        if self.scheduler is None:
            return
        try:
            self.scheduler.step()
        except ValueError as error:  # a one-cycle schedule has an end
            raise TrainingError(
                f"{where}: the {type(self.scheduler).__name__} of Task.scheduler does not go on: "
                f"{error}. It is stepped after each batch: make it for all steps of the training, "
                "batches times epochs"
            ) from error


def _scalar(value: object, source: str) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise TrainingError(
        f"{source} returned a {type(value).__name__}{shape}: "
        "return one real number as a tensor, such as a mean"
    )
