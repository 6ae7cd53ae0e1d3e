"""Training: what to train on (:class:`Task`) and the loop that does it (:func:`fit`)."""

from fxprune.randomness import preserved_random_state
from fxprune.training.evaluate import evaluate
from fxprune.training.fit import FitResult, fit
from fxprune.training.task import Task

__all__ = ["FitResult", "Task", "evaluate", "fit", "preserved_random_state"]
