"""What a pass needs to know in order to train and to judge: the task."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fxprune.errors import ConfigError

__all__ = ["DEFAULT_EPOCHS", "Task", "adam"]

DEFAULT_EPOCHS = 10


def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Adam with a learning rate of 1e-3: the default optimizer of a task."""
    return torch.optim.Adam(parameters, lr=1e-3)


@dataclass(frozen=True, eq=False)
class Task:
    """How to train a model and how to tell whether it is any good.

    Options are checked when the task is made.

    Attributes:
        loss: ``loss(model, batch)`` computes the scalar to minimize. The tensors of the batch are
            already on the device of the model; lengths that must stay on the CPU need ``.cpu()``.
        train: the batches. Iterated once per epoch, so a data loader or a list, not a generator.
            An order drawn from the global generators of torch, numpy or Python, or from the
            generator of a ``DataLoader`` or its sampler, is reproducible and survives a resume;
            one that the object draws from a generator of its own does not.
        validate: ``validate(model)`` gives the metric. It is called in eval mode, without
            gradients, and from the same random state each time.
        goal: "min" if a lower metric is better (loss, perplexity), "max" if a higher one is.
        optimizer: makes an optimizer from the trainable parameters. A fresh one is made for each
            fit. Default: Adam with a learning rate of 1e-3.
        scheduler: makes a learning rate scheduler of ``torch.optim.lr_scheduler`` from that
            optimizer, None (default) for a constant rate. It is stepped after each optimizer step,
            so its counts are steps, not epochs; checkpoints hold its state.
        epochs: passes over ``train``. Default: 10, or as many as ``steps`` needs where it is given.
        steps: limit on optimizer steps over all epochs, None (default) for no limit. The epoch
            that it cuts short is validated like any other.
        clip: largest gradient norm (2-norm over all parameters), None (default) for no clipping.
        patience: stop after so many epochs in a row without a better metric, None (default) to
            go on to the end.
        checkpoint: folder for checkpoints, made if absent; a fit that was killed continues there.
            None (default) for no checkpoints.
        seed: of all random numbers drawn during training, from 0 (default) to 2**32 - 1.
        device: where to train, such as "cuda:0". Default "auto": where the model is.

    Raises:
        ConfigError: an option is wrong.

    Example:
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
        >>> def loss(model, batch):
        ...     return nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> def validate(model):
        ...     return float(loss(model, batches[0]))
        >>> Task(loss, batches, validate, goal="min", epochs=5).epochs
        5
    """

    loss: Callable[[nn.Module, Any], Tensor]
    train: Iterable[Any]
    validate: Callable[[nn.Module], float]
    goal: Literal["min", "max"]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = adam
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    epochs: int | None = None
    steps: int | None = None
    clip: float | None = None
    patience: int | None = None
    checkpoint: str | os.PathLike[str] | None = None
    seed: int = 0
    device: str | torch.device = "auto"

    def __post_init__(self) -> None:
        for name in ("loss", "validate", "optimizer"):
            if not callable(getattr(self, name)):
                _refuse(name, getattr(self, name), "must be callable", "pass a function")
        if self.scheduler is not None and not callable(self.scheduler):
            remedy = "pass a function, such as lambda o: CosineAnnealingLR(o, 1000)"
            _refuse("scheduler", self.scheduler, "must be callable", remedy)
        if self.goal not in ("min", "max"):
            remedy = "'min' where a lower metric is better (a loss), 'max' where a higher one is"
            _refuse("goal", self.goal, "must be 'min' or 'max'", remedy)
        _check_train(self.train)
        _check_integer("epochs", self.epochs, 0)
        _check_integer("steps", self.steps, 1)
        _check_integer("patience", self.patience, 1)
        if self.seed is None:
            _refuse("seed", None, "must be an integer", "leave it out for 0")
        _check_integer("seed", self.seed, 0, 2**32 - 1)
        _check_clip(self.clip)
        _check_checkpoint(self.checkpoint)
        _check_device(self.device)

    @property
    def max_epochs(self) -> float:
        """The limit on epochs that ``epochs`` and ``steps`` amount to; infinite for none."""
        if self.epochs is not None:
            return self.epochs
        return DEFAULT_EPOCHS if self.steps is None else math.inf

    @property
    def batches(self) -> int | None:
        """Number of batches in ``train``, None where it does not tell."""
        return _length(self.train)

    def better(self, metric: float, than: float) -> bool:
        """Whether one metric is strictly better than another, by ``goal``."""
        return metric < than if self.goal == "min" else metric > than


def _refuse(field: str, value: object, problem: str, remedy: str) -> None:
    raise ConfigError(f"Task.{field} {problem}, got {value!r}: {remedy}")


def _length(data: Iterable[Any]) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:  # a DataLoader over data of unknown length has a __len__ that raises
        return None


def _check_train(train: object) -> None:
    # iter(train) would start a DataLoader's workers and draw random numbers: look, don't touch.
    kind = type(train).__name__
    if isinstance(train, Iterator):
        raise ConfigError(
            f"Task.train is an iterator ({kind}), which is used up after one epoch: "
            "pass a list, a DataLoader, or another object that starts anew each time"
        )
    if not isinstance(train, Iterable):
        raise ConfigError(
            f"Task.train cannot be iterated ({kind}): pass an iterable of batches, such as a "
            "DataLoader around a data set"
        )
    if _length(train) == 0:
        raise ConfigError(f"Task.train is empty ({kind} of length 0): pass at least one batch")


def _check_integer(field: str, value: int | None, low: int, high: float = math.inf) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        _refuse(field, value, f"must be an integer, {span}", "correct it or leave it out")


def _check_clip(clip: float | None) -> None:
    if clip is None:
        return
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if not number or not 0 < clip < math.inf:
        remedy = "leave it out to train without clipping"
        _refuse("clip", clip, "must be a positive, finite gradient norm", remedy)


def _check_checkpoint(checkpoint: str | os.PathLike[str] | None) -> None:
    if checkpoint is None:
        return
    if not isinstance(checkpoint, (str, os.PathLike)) or not os.fspath(checkpoint):
        _refuse("checkpoint", checkpoint, "must be the path of a folder", "pass a path or None")
    if Path(checkpoint).exists() and not Path(checkpoint).is_dir():
        _refuse("checkpoint", str(checkpoint), "is a file", "name a folder")


def _check_device(device: str | torch.device) -> None:
    if device == "auto":
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"Task.device is {device!r}, which torch does not know: "
            "use 'auto', 'cpu', 'cuda' or 'cuda:0'"
        ) from error
