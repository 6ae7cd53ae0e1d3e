"""Gradual magnitude pruning: sparsity grows along a cubic while the model trains.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3      for steps t_0 <= t <= t_1

Every ``every`` steps, and at t_1, the mask of each weight is rebuilt so that exactly the
floor(s_t * n + 1e-9) smallest of its n connections are out. In between and afterwards the masks
are fixed. The masks at the end are the result.

1. A masked weight is 0, gets no gradient, and is put back to 0 after each step, whatever momentum
   and weight decay did to it. So it is among the smallest at the next rebuilding, and stays out.
2. Each weight is pruned for itself; the classes of connections may end at ratios of their own, as
   recurrent weights bear less than embeddings and decoders.
3. The weights kept are the best by the task's metric among those at the final sparsity. Early
   stopping (``Task.patience``) is off: the schedule says how long to train.

Source: Zhu, Gupta, "To prune, or not to prune", https://arxiv.org/abs/1710.01878.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxprune.analysis import ConnectionClass
from fxprune.contract import Effect, Facts, NeuronAnalysis, Pass, PassResult, check_number
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.masking.insertion import insert_masks
from fxprune.masking.prunable import Weight, find_prunable
from fxprune.masking.selection import select_connections
from fxprune.policy import protected
from fxprune.program import Program
from fxprune.training import Task, evaluate, fit

__all__ = ["GradualMagnitude"]


@dataclass(frozen=True)
class GradualMagnitude(Pass):
    """Masks more and more of the smallest connections while the model trains on the task.

    Attributes:
        sparsity: the fraction of each weight's connections to remove in the end, in [0, 1).
        feedforward: that of feedforward weights; none (default) for ``sparsity``.
        input: that of weights that feed recurrent neurons; none (default) for ``sparsity``.
        recurrent: that of recurrent weights; none (default) for ``sparsity``.
        initial: the fraction at the start of the schedule, 0 by default.
        start: where the schedule starts, as a fraction of all training steps, 0 by default.
        end: where it ends, 0.75 by default; the rest is trained at the final sparsity.
        every: steps from one rebuilding of the masks to the next, 10 by default.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> str(GradualMagnitude(0.9, recurrent=0.8))
        'gradual-magnitude{sparsity=0.9,recurrent=0.8}'
    """

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})
    needs_task = True

    sparsity: float
    feedforward: float | None = None
    input: float | None = None
    recurrent: float | None = None
    initial: float = 0.0
    start: float = 0.0
    end: float = 0.75
    every: int = 10

    def __post_init__(self) -> None:
        given = [c.value for c in ConnectionClass if getattr(self, c.value) is not None]
        for option in ("sparsity", *given, "initial", "start"):
            check_number(self, option, 0, 1)
        check_number(self, "end", 0, math.inf)
        if not self.start <= self.end <= 1:
            raise ConfigError(
                f"options 'start' and 'end' of pass {self.name!r} must be fractions of the "
                f"training, start <= end <= 1, not {self.start!r} and {self.end!r}"
            )
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(
                f"option 'every' of pass {self.name!r} must be an integer, at least 1, "
                f"not {self.every!r}"
            )
        for option in ("sparsity", *given):
            if self.initial > getattr(self, option):
                raise ConfigError(
                    f"option 'initial' of pass {self.name!r} is {self.initial!r}, more than "
                    f"{option!r}: sparsity only grows"
                )

    def requires(self, program: Program, facts: Facts) -> None:
        """The schedule needs to know how long the training is.

        Raises:
            PreconditionError: the task does not tell, or it trains for no step at all.
        """
        assert facts.context.task is not None  # the pipeline saw to it
        if not self._steps(facts.context.task):
            raise PreconditionError(
                "the task trains for no step, and masks grow with the steps. Give epochs, or use "
                "Magnitude to prune without training.",
                pass_name=self.name,
            )

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Trains; replaces the weights and adds to the masks of the program."""
        task, neurons = facts.context.task, facts[NeuronAnalysis]
        assert task is not None  # the pipeline saw to it
        found = find_prunable(program, neurons, protected(program, neurons, facts.context.protect))
        module = insert_masks(_own_tensors(program), neurons).module()
        steps = self._steps(task)
        begin, end = round(self.start * steps), max(1, round(self.end * steps))
        growing = _GrowingMasks(module, found.maskable, self, begin, end)

        def metric(trained: nn.Module) -> float:
            value = evaluate(trained, task)
            worst = math.inf if task.goal == "min" else -math.inf
            return value if growing.finished else worst

        fit(
            module,
            replace(task, validate=metric, patience=None),
            after_step=growing.advance,
            name=str(self),  # which checkpoint: one of another schedule would not fit
        )
        if not growing.finished:
            raise TrainingError(
                f"no validation after step {end}, where the sparsity is final, gave a finite "
                "metric: check Task.validate, and that Task.train gives as many batches as its "
                "length says"
            )
        masks = program.masks.cut_connections(growing.masks())
        trained = replace(program, tensors=_tensors_after(module, program), masks=masks)
        return PassResult(trained, True, found.kept_weights)

    def final(self, kind: ConnectionClass) -> float:
        """The sparsity that a class of connections ends at."""
        own: float | None = getattr(self, kind.value)
        return self.sparsity if own is None else own

    def _steps(self, task: Task) -> float:
        if task.batches is not None:
            limit = math.inf if task.steps is None else task.steps
            return min(limit, task.max_epochs * task.batches if task.max_epochs else 0)
        if task.steps is not None and task.epochs is None:
            return task.steps
        raise PreconditionError(
            "Task.train does not tell how many batches it has, so the schedule cannot be laid "
            "out. Give Task.steps instead of epochs, or a train with a length.",
            pass_name=self.name,
        )


class _GrowingMasks:
    """The masks of one training, kept in buffers of the module so that a resumed fit has them."""

    def __init__(
        self,
        module: nn.Module,
        weights: Sequence[Weight],
        options: GradualMagnitude,
        begin: int,
        end: int,
    ) -> None:
        self.module, self.weights, self.options = module, weights, options
        self.begin, self.end = begin, end
        module.register_buffer("_gradual_step", torch.zeros((), dtype=torch.int64))
        for number, weight in enumerate(weights):
            parameter = module.get_parameter(weight.name)
            keep = torch.ones_like(parameter, dtype=torch.bool)
            module.register_buffer(f"_gradual_keep_{number}", keep)
            if parameter.requires_grad:
                parameter.register_hook(lambda g, n=number: g * self._keep(n))
        self._update()

    @property
    def finished(self) -> bool:
        """Whether the sparsity is final."""
        return self._step >= self.end

    def advance(self) -> None:
        """After each optimizer step: counts it, rebuilds what is due, zeroes what is masked."""
        self.module.get_buffer("_gradual_step").add_(1)
        self._update()

    def masks(self) -> dict[str, Tensor]:
        """The masks as they are, of the weights that lost connections."""
        kept = {w.name: self._keep(i) for i, w in enumerate(self.weights)}
        return {name: keep for name, keep in kept.items() if not bool(keep.all())}

    @torch.no_grad()
    def _update(self) -> None:
        step = self._step
        due = self.begin <= step <= self.end and (
            (step - self.begin) % self.options.every == 0 or step == self.end
        )
        for number, weight in enumerate(self.weights):
            parameter = self.module.get_parameter(weight.name)
            if due:
                sparsity = self._sparsity(step, self.options.final(weight.connection_class))
                chosen = select_connections([replace(weight, tensor=parameter)], sparsity)
                self._keep(number).copy_(chosen.get(weight.name, torch.ones(())))
            parameter.mul_(self._keep(number))

    def _sparsity(self, step: int, final: float) -> float:
        done = (step - self.begin) / max(1, self.end - self.begin)
        return final + (self.options.initial - final) * (1 - done) ** 3 if done < 1 else final

    def _keep(self, number: int) -> Tensor:
        return self.module.get_buffer(f"_gradual_keep_{number}")

    @property
    def _step(self) -> int:
        return int(self.module.get_buffer("_gradual_step"))


def _own_tensors(program: Program) -> Program:
    with torch.inference_mode(False):
        tensors = {n: _like(t, t.detach().clone()) for n, t in program.tensors.items()}
    return replace(program, tensors=tensors)


def _tensors_after(module: nn.Module, program: Program) -> dict[str, Tensor]:
    """The program's tensors as the module has them; without the hooks of the training."""
    state: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {n: _like(t, state.get(n, t).detach()) for n, t in program.tensors.items()}


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value
