"""Judging a module by the metric of its task."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from fxprune.errors import TrainingError
from fxprune.randomness import preserved_random_state
from fxprune.training.placement import kept_modes
from fxprune.training.task import Task

__all__ = ["evaluate"]


def evaluate(
    module: nn.Module, task: Task, *, where: str = "validation", allow_nan: bool = False
) -> float:
    """Compute the metric of a module where it is, in eval mode, without gradients.

    The mode and the random state are afterwards as they were.

    Args:
        module: what to judge.
        task: says how.
        where: names the moment in an error.
        allow_nan: whether NaN is an answer, of a model that may be any good or none.

    Raises:
        TrainingError: the metric is no number, or NaN where it may not be.
    """
    with kept_modes(module), preserved_random_state(task.seed), torch.no_grad():
        module.eval()
        value: object = task.validate(module)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if not isinstance(value, Real) or (math.isnan(value) and not allow_nan):
        raise TrainingError(
            f"{where}: Task.validate returned {value!r} ({type(value).__name__}): "
            "it must return one number that is not NaN"
        )
    return float(value)
