"""The contract of a pass that learns its masks while the model trains.

``attach`` puts gates or mask modules into the graph and hands back a :class:`Learning`: a module
to train, a penalty for the loss, a step after each optimizer step, and ``harden``, which turns
what was learned into masks and weights. In the last part of a training the masks no longer
change; the best weights are chosen among the epochs of that part, by the task's metric.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, distributed, fx, nn

from fxprune.contract import Effect, Facts, NeuronAnalysis, Pass, PassResult
from fxprune.errors import PreconditionError, TrainingError
from fxprune.training.evaluate import evaluate
from fxprune.training.fit import fit

if TYPE_CHECKING:
    from fxprune.program import Program, Refusal
    from fxprune.training.task import Task

__all__ = ["LearnedPass", "Learning"]


class Learning(ABC):
    """A program whose masks are learned.

    All that changes from step to step lies in parameters and buffers of the module, so that its
    ``state_dict`` resumes a training anywhere.

    Attributes:
        program: what it was attached to, over tensors of its own, which the module trains.
        module: to be trained.
        refusals: what may not be pruned, and why.
    """

    program: Program
    module: fx.GraphModule
    refusals: tuple[Refusal, ...] = ()

    def penalty(self) -> Tensor:
        """What to add to the loss of each batch, a scalar; 0 unless the pass has one."""
        first = next(self.module.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)

    @abstractmethod
    def step(self) -> None:
        """To be called after each optimizer step."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the masks will not change any more."""

    @abstractmethod
    def harden(self) -> Program:
        """The program with what was learned, as masks and weights.

        It computes what the module does in evaluation mode. The module stays as it is.
        """


class LearnedPass(Pass):
    """Base of the passes that learn masks while the model trains."""

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})
    needs_task: ClassVar[bool] = True

    @abstractmethod
    def attach(self, program: Program, facts: Facts, steps: int) -> Learning:
        """Puts gates or masks into a program.

        Args:
            program: stays as it is.
            facts: about it.
            steps: optimizer steps that the training will take.
        """

    def requires(self, program: Program, facts: Facts) -> None:
        """The schedule needs to know how long the training is.

        Raises:
            PreconditionError: the task does not tell, or it trains for no step at all.
        """
        if facts.context.task is not None:
            training_steps(facts.context.task, self.name)

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Trains the model with its masks and hardens them.

        Raises:
            TrainingError: no epoch after the masks became final gave a finite metric.
        """
        context = facts.context
        task = context.task
        assert task is not None  # the pipeline saw to it
        learning = self.attach(program, facts, training_steps(task, self.name))

        def metric(module: nn.Module) -> float:
            value = evaluate(module, task)
            worst = math.inf if task.goal == "min" else -math.inf
            return value if learning.finished else worst  # earlier masks are not the result

        fit(
            learning.module,
            replace(task, validate=metric, patience=None),
            after_step=learning.step,
            penalty=learning.penalty,
            progress=context.progress,
            name=_name(self, program),
        )
        if not learning.finished:
            raise TrainingError(
                "the masks never became final: no validation after that gave a finite metric. "
                "Check Task.validate, and that Task.train gives as many batches as its length says"
            )
        hardened = learning.harden()
        require_agreement(hardened)
        return PassResult(hardened, True, learning.refusals)


def _name(pass_: Pass, program: Program) -> str:
    """Of the training and its checkpoint: with other options, or masks to begin with, another."""
    masks = program.masks
    if masks.empty:
        return str(pass_)
    masked = sum(int(keep.logical_not().sum()) for keep in masks.connections.values())
    return f"{pass_} after {len(masks.neurons)} neurons and {masked} connections"


def training_steps(task: Task, pass_name: str) -> int:
    """How many optimizer steps a task takes.

    Raises:
        PreconditionError: it does not tell, or it takes none.
    """
    limit = math.inf if task.steps is None else task.steps
    if task.batches is not None:
        steps = min(limit, task.max_epochs * task.batches if task.max_epochs else 0)
    elif task.steps is not None and task.epochs is None:
        steps = task.steps
    else:
        raise PreconditionError(
            "Task.train does not tell how many batches it has, so the schedule cannot be laid "
            "out. Give Task.steps instead of epochs, or a train with a length.",
            pass_name=pass_name,
        )
    if not steps:
        raise PreconditionError(
            "the task trains for no step, and masks are learned step by step. Give epochs, or "
            "use Magnitude to prune without training.",
            pass_name=pass_name,
        )
    return int(steps)


def require_agreement(program: Program) -> None:
    """Checks that every process arrived at the same masks.

    Raises:
        TrainingError: they differ.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    digest = hashlib.sha256(program.masks.neurons.numpy().tobytes())
    for name, mask in sorted(program.masks.connections.items()):
        digest.update(name.encode() + mask.contiguous().numpy().tobytes())
    found: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, digest.hexdigest())
    if len(set(found)) > 1:
        raise TrainingError(
            f"the processes disagree about the masks ({len(set(found))} versions over "
            f"{len(found)} processes). Train the module through DistributedDataParallel (or "
            "accelerate), call step() on every process, and start all from the same weights."
        )
