"""Neuron selection: gates on neurons are learned with the task, and closed neurons go.

    loss + penalty * (expected cost) / (cost),  gates hard concrete     (criterion "l0")
    loss + penalty * sum of ||weights of a neuron|| / reference         (criterion "group_lasso")

Each neuron has one gate, which scales whatever leaves it, in every block that reads it and at all
time steps; where two layers meet, and for tied weights, it is the same. The expected cost counts
a connection with the probability of both its ends.

1. ``penalty`` sets the strength. ``target`` sets the cost that is to be left, and the strength is
   controlled (:mod:`fxprune.learning.budget`): the goal falls over the steps up to ``ramp``. For
   group lasso the sum of norms is led to the root of the target; the reference is the mean norm
   that the group of the neuron began with.
2. At ``end`` the gates become what they are without noise, and stay. With a target, the neurons of
   highest gate (or norm) are there, as many as it allows: some close, or open again by a tenth.
3. Each group keeps a neuron: of a group with closed gates only, the best one is open.
4. Hardening folds the gates that are between 0 and 1 into the weights and cuts those at 0, so the
   result computes what the gated model did in evaluation.
5. What may not go (frozen or protected neurons) has no gate, and is named with its reason.

Source: Wen, Zhang, Bai, Xu, "Structured pruning of recurrent neural networks through neuron
selection", Neural Networks 123, 2020, https://arxiv.org/abs/1906.06847; for group lasso Wen et
al., "Learning intrinsic sparse structures within long short-term memory", ICLR 2018,
https://arxiv.org/abs/1709.05027.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fxprune.analysis import Neurons
from fxprune.contract import Facts, NeuronAnalysis, check_choice, check_idle, check_number
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.learning import LearnedPass, Learning, Schedule
from fxprune.learning.budget import Budget
from fxprune.learning.candidates import SCOPES, Candidates
from fxprune.learning.cost import COSTS, Cost
from fxprune.learning.group_lasso import GroupLasso
from fxprune.learning.hard_concrete import HardConcrete
from fxprune.learning.neuron_gates import NeuronGates
from fxprune.masking.gating import GATES, fold_scales, insert_gates
from fxprune.masking.prunable import Prunable, find_prunable
from fxprune.policy import protected
from fxprune.program import Program
from fxprune.weights import owned, with_weights_of

__all__ = ["NeuronSelection"]


@dataclass(frozen=True)
class NeuronSelection(LearnedPass):
    """Learns which neurons a task needs, and removes the others.

    Attributes:
        target: the fraction of the cost to be left, in (0, 1); this or ``penalty``.
        penalty: what all of the cost adds to the loss, or for group lasso what a neuron of its
            group's first mean norm does.
        cost: what is to be saved: "macs" (default), "parameters" or "milliseconds", which are
            measured on the example when the training begins. It is that of all weights; products
            of two activations, as in attention, have no neurons to select and are not in it.
        criterion: how gates are learned, "l0" (default) or "group_lasso".
        scope: the neurons that get a gate: "recurrent" (default), those of recurrent layers and
            cells and those that feed them, or "all".
        rows: scale a connection by the gates of both its ends, as the paper does, rather than by
            that of the neuron it comes from.
        rate: learning rate of hard concrete gates, at which Adam moves ln(p / (1 - p)). None
            (default) for 40 divided by the steps of the training, within [0.01, 0.1].
        drop: the probability p that a hard concrete gate is closed by in the beginning, in (0, 1).
        threshold: of group lasso, the fraction of its group's first mean norm below which a
            neuron goes.
        ramp: the fraction of the training after which the goal stands at ``target``; without one
            there is no goal.
        end: the fraction after which gates are final; the rest trains what is left.

    Raises:
        ConfigError: an option is out of range, or has no effect with the others, or not exactly one
            of target and penalty is given.

    Example:
        >>> str(NeuronSelection(target=0.1, cost="parameters"))
        'neuron-selection{target=0.1,cost=parameters}'
    """

    target: float | None = None
    penalty: float | None = None
    cost: Literal["macs", "parameters", "milliseconds"] = "macs"
    criterion: Literal["l0", "group_lasso"] = "l0"
    scope: Literal["recurrent", "all"] = "recurrent"
    rows: bool = False
    rate: float | None = None
    drop: float = 0.05
    threshold: float = 0.1
    ramp: float = 0.5
    end: float = 0.75

    def __post_init__(self) -> None:
        if (self.target is None) == (self.penalty is None):
            raise ConfigError(
                f"pass {self.name!r} takes either 'target', the fraction of the cost to be left, "
                f"or 'penalty', not {'both' if self.target is not None else 'neither'}"
            )
        given = [o for o in ("target", "rate") if getattr(self, o) is not None]
        for option in (*given, "drop", "threshold"):
            check_number(self, option, 0, 1, positive=True)
        if self.penalty is not None:
            check_number(self, "penalty", 0, math.inf)
        check_choice(self, "cost", COSTS)
        check_choice(self, "criterion", ("l0", "group_lasso"))
        check_choice(self, "scope", SCOPES)
        check_choice(self, "rows", (False, True))
        check_number(self, "ramp", 0, math.inf)
        check_number(self, "end", 0, math.inf)
        self._check_idle()
        if not (self.ramp if self.target is not None else 0) <= self.end <= 1:
            raise ConfigError(
                f"options 'ramp' and 'end' of pass {self.name!r} must be fractions of the "
                f"training, ramp <= end <= 1, not {self.ramp!r} and {self.end!r}"
            )

    def _check_idle(self) -> None:
        if self.criterion == "l0":
            check_idle(self, ("threshold",), "criterion=l0")
        else:
            check_idle(self, ("rate", "drop"), "criterion=group_lasso")
        if self.penalty is not None:
            check_idle(self, ("ramp",), "a penalty, which is the same throughout")
            if self.criterion == "group_lasso":
                check_idle(
                    self, ("cost",), "criterion=group_lasso and a penalty, which is of norms"
                )

    def attach(self, program: Program, facts: Facts, steps: int) -> Learning:
        """Gives a gate to each neuron that may go.

        Raises:
            PreconditionError: there is none, none costs anything, or the target is less than one
                neuron of each group costs.
        """
        neurons, context = facts[NeuronAnalysis], facts.context
        found = find_prunable(program, neurons, protected(program, neurons, context.protect))
        candidates, cost = Candidates(found, self.scope), Cost(program, neurons, self.cost)
        self._require(candidates, cost, found)
        own = owned(program)
        if self.criterion == "l0":
            rate = min(0.1, max(0.01, 40 / steps)) if self.rate is None else self.rate
            gates: NeuronGates = HardConcrete(candidates, cost, drop=self.drop, rate=rate)
        else:
            gates = GroupLasso(candidates, own, found.weights, self.threshold)
        folder = None if context.task is None else context.task.checkpoint
        return _Selection(own, found, gates, cost, self, steps, str(folder or ""))

    def _require(self, candidates: Candidates, cost: Cost, found: Prunable) -> None:
        if not len(candidates):
            reasons = "; ".join(f"{r.node}: {r.reason}" for r in found.kept_neurons[:8])
            wider = "Use scope=all, or" if self.scope == "recurrent" else "Use"
            raise PreconditionError(
                f"this model has nothing to select: no neuron of scope {self.scope!r} may go "
                f"({reasons or 'it has none'}). {wider} a pass that removes connections.",
                pass_name=self.name,
            )
        if cost.dense == 0:
            raise PreconditionError(
                f"none of this model's connections costs any {self.cost}: choose another cost.",
                pass_name=self.name,
            )
        least = candidates.least(cost)
        if self.target is not None and self.target < least:
            raise PreconditionError(
                f"target={self.target:g} is less than one neuron of each group allows: "
                f"{math.ceil(least * 1e4) / 1e4:g} of the {self.cost} is the least possible here.",
                pass_name=self.name,
            )


class _Selection(Learning):
    """One training with gates; what it remembers lies in buffers of the gates."""

    def __init__(
        self,
        program: Program,
        found: Prunable,
        gates: NeuronGates,
        cost: Cost,
        options: NeuronSelection,
        steps: int,
        folder: str,
    ) -> None:
        self.program, self.refusals, self.options = program, found.kept_neurons, options
        self.neurons: Neurons = found.neurons
        self.gates, self.cost, self.folder = gates, cost, folder
        self.ramp = Schedule(steps, 0.0, options.ramp)
        self.schedule = Schedule(steps, 0.0, options.end)
        self.budget: Budget | None = None
        if options.target is not None:
            self.budget = Budget(gates.goal(options.target), self.ramp.last)
        gates.register_buffer("step", torch.zeros((), dtype=torch.int64))
        gates.add_module("budget", self.budget)
        gates.add_module("cost", cost)
        flags = gates.candidates.flags()
        gated = insert_gates(program, self.neurons, gated=flags, rows=options.rows)
        home = next(t.device for t in program.tensors.values())
        self.module = gated.module({GATES: gates.to(home)})

    def penalty(self) -> Tensor:
        """The penalty of the gates as they are; 0 once they are final."""
        if self.finished:
            return super().penalty()
        measure = self.gates.measure(self.module)
        if self.budget is not None:
            return self.budget.penalty(measure)
        assert self.options.penalty is not None
        if isinstance(self.gates, GroupLasso):
            return self.options.penalty * self.gates.penalty(self.module)
        return self.options.penalty * measure

    @property
    def finished(self) -> bool:
        """Whether the gates are final."""
        return bool(self.gates.fixed)

    def step(self) -> None:
        """Learns from the step, and fixes the gates when it is time.

        Raises:
            TrainingError: the penalty has closed every gate.
        """
        step = self.gates.get_buffer("step").add_(1)
        self.cost.keep_prices()
        self.gates.update(self.module)
        if self.finished:
            return
        if self.budget is not None:
            self.budget.update(self.gates.measure(self.module), self.ramp.progress(int(step)))
        elif not bool((self.gates.learned() > 0).any()):
            self._give_up(int(step))
        if int(step) >= self.schedule.last:
            self._finish()

    @torch.no_grad()
    def harden(self) -> Program:
        """Closed neurons cut, scales in the weights."""
        trained = with_weights_of(self.program, self.module)
        gates = self.gates.settled().detach()
        scale = torch.cat([self.gates.candidates.spread(gates), gates.new_ones(1)])
        folded = fold_scales(trained, self.neurons, scale, rows=self.options.rows)
        closed = self.gates.candidates.numbers[gates == 0]
        masks = self.program.masks.cut_neurons(closed)
        return replace(owned(trained, folded), masks=masks)

    def _finish(self) -> None:
        target, there = self.options.target, None
        if target is not None:
            there = self.gates.candidates.within(self.gates.scores(), self.cost, target)
        self.gates.fix(there)

    def _give_up(self, step: int) -> None:
        kept = (
            f"The last checkpoint is in {self.folder!r}."
            if self.folder
            else "There is no checkpoint: Task.checkpoint was not given."
        )
        raise TrainingError(
            f"the penalty has closed the gate of every neuron after {step} steps: lower "
            f"penalty={self.options.penalty:g}, or give a target instead. {kept}"
        )
