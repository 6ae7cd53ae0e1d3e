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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxprune.analysis import ConnectionClass, Neurons
from fxprune.contract import Facts, NeuronAnalysis, check_count, check_number
from fxprune.errors import ConfigError
from fxprune.learning import LearnedPass, Learning, Schedule
from fxprune.masking.insertion import insert_masks
from fxprune.masking.prunable import Prunable, find_prunable
from fxprune.masking.selection import select_connections
from fxprune.policy import protected
from fxprune.program import Program
from fxprune.weights import owned, with_weights_of

__all__ = ["GradualMagnitude"]


@dataclass(frozen=True)
class GradualMagnitude(LearnedPass):
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
        check_count(self, "every")
        for option in ("sparsity", *given):
            if self.initial > getattr(self, option):
                raise ConfigError(
                    f"option 'initial' of pass {self.name!r} is {self.initial!r}, more than "
                    f"{option!r}: sparsity only grows"
                )

    def attach(self, program: Program, facts: Facts, steps: int) -> Learning:
        """Keeps the smallest connections at 0, more and more of them."""
        neurons = facts[NeuronAnalysis]
        found = find_prunable(program, neurons, protected(program, neurons, facts.context.protect))
        return _GrowingMasks(owned(program), neurons, found, self, steps)

    def final(self, kind: ConnectionClass) -> float:
        """The sparsity that a class of connections ends at."""
        own: float | None = getattr(self, kind.value)
        return self.sparsity if own is None else own


class _GrowingMasks(Learning):
    """The masks of one training, kept in buffers of the module."""

    def __init__(
        self,
        program: Program,
        neurons: Neurons,
        found: Prunable,
        options: GradualMagnitude,
        steps: int,
    ) -> None:
        self.program, self.options = program, options
        self.module = insert_masks(program, neurons).module()
        self.weights, self.refusals = found.maskable, found.kept_weights
        self.schedule = Schedule(steps, options.start, options.end)
        self.module.register_buffer("_gradual_step", torch.zeros((), dtype=torch.int64))
        for number, weight in enumerate(self.weights):
            parameter = self.module.get_parameter(weight.name)
            keep = torch.ones_like(parameter, dtype=torch.bool)
            self.module.register_buffer(f"_gradual_keep_{number}", keep)
            if parameter.requires_grad:
                parameter.register_hook(lambda g, n=number: g * self._keep(n))
        self._update()

    @property
    def finished(self) -> bool:
        """Whether the sparsity is final."""
        return self._step >= self.schedule.last

    def step(self) -> None:
        """Counts the step, rebuilds what is due, zeroes what is masked."""
        self.module.get_buffer("_gradual_step").add_(1)
        self._update()

    def harden(self) -> Program:
        """The masks as they are, of the weights that lost connections; without the hooks."""
        kept = {w.name: self._keep(i) for i, w in enumerate(self.weights)}
        cut = {name: keep for name, keep in kept.items() if not bool(keep.all())}
        masks = self.program.masks.cut_connections(cut)
        trained = owned(with_weights_of(self.program, self.module))
        return replace(trained, masks=masks)

    @torch.no_grad()
    def _update(self) -> None:
        step = self._step
        due = self.schedule.due(step, self.options.every)
        for number, weight in enumerate(self.weights):
            parameter = self.module.get_parameter(weight.name)
            if due:
                sparsity = self._sparsity(step, self.options.final(weight.connection_class))
                # What is left counts as more than 0, so that it never goes in place of what is out.
                least = torch.finfo(parameter.dtype).tiny
                scores = parameter.abs().clamp(min=least) * self._keep(number)
                chosen = select_connections([replace(weight, tensor=scores)], sparsity)
                self._keep(number).copy_(chosen.get(weight.name, torch.ones(())))
            parameter.mul_(self._keep(number))

    def _sparsity(self, step: int, final: float) -> float:
        left: float = (1 - self.schedule.progress(step)) ** 3
        return final + (self.options.initial - final) * left if left else final

    def _keep(self, number: int) -> Tensor:
        return self.module.get_buffer(f"_gradual_keep_{number}")

    @property
    def _step(self) -> int:
        return int(self.module.get_buffer("_gradual_step"))
