"""Sparse connectivity learning: whether a connection is there is trained as its weight is.

    w~ = w H(m),  H(m) = 1 if m > 0 else 0        a mask variable m for each weight w
    d_m = (dL/dw~ w) g'(m)                        g' > 0 stands for the slope of H
    m  <- m - rate (d_m / ||d_m||_f + price g'(m))      clamped to [-bound, bound]

where ||.||_f is the 2-norm over the feature f that m belongs to. Weights and mask variables
minimize the loss plus a price for every connection that is on. As g' is positive, a variable moves
by what the loss would do if its connection were switched: one that is off and missing returns.

1. Mask variables are no parameters: neither weight decay nor clipping touches them. Gradients are
   averaged over all processes, then normalized, and the price is added then; so ``penalty()`` is 0.
2. A feature is a row of the weight, everything that leads to one output; in a recurrent layer to
   one gate of one unit, or (``feature="unit"``) to all gates of a unit. A feature that is off as a
   whole keeps a gradient of a norm below 1 as it is: division would only amplify noise.
3. ``structure="filter"`` has one variable per feature instead, and a feature then is all filters
   of a weight, or of one gate of it. The price of a filter is in proportion to its connections.
4. A connection that is off keeps its weight, whatever the optimizer does to it: it may return.
   For that the weights are copied in each forward, until the step that follows.
5. ``target`` controls the price: the fraction of connections kept falls along target^progress and
   stands at the target for the last fifth of the learning. At its end, the highest variables are
   kept, as many as the target allows.
6. From ``end`` on the masks are final, and the weights that are left are fine-tuned.
7. Each weight keeps at least one connection (or filter). Biases are left alone.

Source: Tang et al., "Automatic sparse connectivity learning for neural networks", TNNLS 2022,
https://arxiv.org/abs/2201.05020. What a feature is, the control and the last steps are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fxprune.analysis import Neurons
from fxprune.contract import Facts, NeuronAnalysis, check_choice, check_number
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.learning import LearnedPass, Learning, MaskVariables, Schedule
from fxprune.learning.budget import SHARPNESS, Budget
from fxprune.masking.gating import insert_gates, mask_module_name
from fxprune.masking.prunable import Prunable, Weight, find_prunable
from fxprune.masking.selection import removal_count
from fxprune.passes._connectivity_masks import (
    ESTIMATORS,
    ON,
    ConnectionMask,
    Partition,
    open_connections,
    partition,
)
from fxprune.policy import protected
from fxprune.program import Program
from fxprune.weights import owned, with_weights_of

__all__ = ["SparseConnectivity"]

SETTLING = 0.8
"""After which part of the learning the fraction kept is to be at the target."""

FIRST_PRICE = 1e-3
"""What the controlled price begins at."""

HIGHEST_PRICE = 1.0
"""What it is at most: no element of a normalized gradient is larger."""

BISECTIONS = 64
"""Halvings after which variables count as equal."""

OVERSHOT = 0.5
"""Of what a target allows, the part below which connections are turned on again."""


@dataclass(frozen=True)
class SparseConnectivity(LearnedPass):
    """Learns which connections to keep, by a mask variable for each of them.

    Exactly one of ``penalty`` and ``target`` is given. Neither knows layers.

    Attributes:
        penalty: what a connection that is on costs, in units of the normalized gradient, whose
            elements have a root mean square of 1 / sqrt(size of the feature).
        target: the fraction of all connections to keep, in (0, 1).
        estimator: the slope g'(m) of the unit step: "identity" 1 (default), "softplus"
            sigmoid(m), "leaky_relu" 1 above 0 and 0.1 below.
        structure: what has a mask variable, "connection" (default) or "filter": the connections
            that lead to one output.
        feature: on recurrent weights, whether one gate of a unit is an output of its own, "row"
            (default), or all gates of a unit are one, "unit".
        normalize: whether gradients are divided by the norm over their feature; they must be under
            a loss scaler, which leaves those of mask variables scaled.
        rate: how far a mask variable moves in the whole learning under a gradient of 1: the
            learning rate is this over the number of steps, but at most ``initial``.
        initial: where mask variables begin, above 0: all connections are on.
        bound: the largest magnitude of a mask variable, at least ``initial``.
        end: where the masks become final, as a fraction of all training steps.

    Raises:
        ConfigError: an option is out of range, or not one of penalty and target is given.

    Example:
        >>> str(SparseConnectivity(target=0.05))
        'sparse-connectivity{target=0.05}'
    """

    penalty: float | None = None
    target: float | None = None
    estimator: Literal["identity", "softplus", "leaky_relu"] = "identity"
    structure: Literal["connection", "filter"] = "connection"
    feature: Literal["row", "unit"] = "row"
    normalize: bool = True
    rate: float = 30.0
    initial: float = 0.1
    bound: float = 1.0
    end: float = 0.75

    def __post_init__(self) -> None:
        if (self.penalty is None) == (self.target is None):
            raise ConfigError(
                f"pass {self.name!r} needs either option 'penalty', the price of a connection, or "
                f"option 'target', the fraction of them to keep; got penalty={self.penalty!r} and "
                f"target={self.target!r}"
            )
        if self.penalty is not None:
            check_number(self, "penalty", 0, math.inf)
        else:
            check_number(self, "target", 0, 1, positive=True)
        check_choice(self, "estimator", tuple(ESTIMATORS))
        check_choice(self, "structure", ("connection", "filter"))
        check_choice(self, "feature", ("row", "unit"))
        check_choice(self, "normalize", (True, False))
        self._check_positive("rate")
        self._check_positive("bound")
        self._check_positive("initial", self.bound)
        self._check_positive("end", 1)

    def _check_positive(self, option: str, most: float = math.inf) -> None:
        check_number(self, option, 0, math.inf)
        value = getattr(self, option)
        if not 0 < value <= most:
            limit = "" if math.isinf(most) else f" and at most {most:g}"
            raise ConfigError(
                f"option {option!r} of pass {self.name!r} must be more than 0{limit}, not {value!r}"
            )

    def attach(self, program: Program, facts: Facts, steps: int) -> Learning:
        """Masks every weight that may be masked, by variables that are all on.

        Raises:
            PreconditionError: there is no such weight, or the target leaves less than one
                connection to each.
        """
        neurons = facts[NeuronAnalysis]
        found = find_prunable(program, neurons, protected(program, neurons, facts.context.protect))
        return _Connectivity(owned(program), neurons, found, self, steps)


class _Connectivity(Learning):
    """Mask variables of one training; what changes lies in the mask modules and two buffers."""

    def __init__(
        self,
        program: Program,
        neurons: Neurons,
        found: Prunable,
        options: SparseConnectivity,
        steps: int,
    ) -> None:
        self.program, self.options, self.refusals = program, options, found.kept_weights
        self.schedule = Schedule(steps, 0.0, options.end)
        self.masks = {
            w.name: self._mask(w, partition(w, neurons, options.structure, options.feature))
            for w in found.maskable
            if bool(open_connections(w).any())
        }
        sizes = [mask.all_sizes for mask in self.masks.values()]
        self.total = sum(int(s.sum()) for s in sizes)
        target = 0.0 if options.target is None else options.target
        self.allowed = self.total - removal_count(1 - target, self.total)
        self._check(found)
        self.average = self.total / sum(int((s > 0).sum()) for s in sizes)
        parts = {mask_module_name(name): mask for name, mask in self.masks.items()}
        self.module = insert_gates(program, neurons, masked=self.masks).module(parts)
        self.module.register_buffer("_connectivity_step", torch.zeros((), dtype=torch.int64))
        price = FIRST_PRICE if options.penalty is None else options.penalty
        self.module.register_buffer("_connectivity_price", torch.tensor(price))
        self.budget: Budget | None = None
        if options.target is not None:
            self.budget = Budget(options.target, self.schedule.last, FIRST_PRICE)
            self.module.add_module("_connectivity_budget", self.budget)

    def _mask(self, weight: Weight, parts: Partition) -> ConnectionMask:
        """All on, but for what earlier masks cut."""
        options = self.options
        if parts.sizes is None:
            values = torch.full(weight.tensor.shape, options.initial)
        else:
            values = torch.where(parts.sizes > 0, options.initial, -options.bound)
        rate = min(options.rate / self.schedule.last, options.initial)
        variables = MaskVariables(values, rate=rate, rule="sgd", bound=options.bound)
        return ConnectionMask(variables, parts, options.estimator).to(weight.tensor.device)

    def _check(self, found: Prunable) -> None:
        """Refuses what cannot be learned."""
        if not self.masks:
            reasons = "; ".join(f"{r.node}: {r.reason}" for r in found.kept_weights)
            raise PreconditionError(
                "there is no weight whose connections may be masked, so there is nothing to "
                f"learn ({reasons or 'the model has none'}). Leave the pass out, or protect less.",
                pass_name=self.options.name,
            )
        if self.options.target is not None and self.allowed < len(self.masks):
            raise PreconditionError(
                f"option 'target' is {self.options.target:g}, which keeps {self.allowed} of "
                f"{self.total} connections, but each of {len(self.masks)} weights keeps at least "
                "one. Raise the target, or protect the smallest weights.",
                pass_name=self.options.name,
            )

    @property
    def finished(self) -> bool:
        """Whether the masks are final."""
        return self._step >= self.schedule.last

    @torch.no_grad()
    def step(self) -> None:
        """Puts weights right that are off, and moves the mask variables, until they are final.

        Raises:
            TrainingError: not one connection of the model was left.
        """
        if self.finished:
            return
        price = self.module.get_buffer("_connectivity_price")
        each = float(price) / self.average
        for name, mask in self.masks.items():
            mask.restore(self.module.get_parameter(name))
            mask.update(each, normalize=self.options.normalize)
        kept = self._count()
        self.module.get_buffer("_connectivity_step").add_(1)
        if self.budget is not None:
            progress = self.schedule.progress(self._step) / SETTLING
            self.budget.update(kept / self.total, min(1.0, progress))
            price.fill_(_price(self.budget, kept / self.total))
        if self.finished:
            self._freeze()

    def harden(self) -> Program:
        """The connections that are on, and the weights as they are."""
        keep = {
            name: mask.keep().cpu().expand(self.program.tensors[name].shape).contiguous()
            for name, mask in self.masks.items()
        }
        cut = {name: kept for name, kept in keep.items() if not bool(kept.all())}
        masks = self.program.masks.cut_connections(cut)
        return replace(owned(with_weights_of(self.program, self.module)), masks=masks)

    def _count(self) -> int:
        """How many connections are on, once all are that must be: one in each weight.

        A price that overshot a target has the highest turned on again.
        """
        kept = self._kept()
        if sum(kept) < self.allowed * OVERSHOT:
            self._keep_highest()
            kept = self._kept()
        elif not any(kept):
            raise TrainingError(
                f"every connection of the model was off after step {self._step + 1}: its price "
                "outweighed the loss. Lower the penalty or the rate, or give a target instead; "
                "the last checkpoint, if any, is from before that."
            )
        for mask, count in zip(self.masks.values(), kept, strict=True):
            if not count:
                mask.raise_highest(ON)
        return sum(kept)

    def _kept(self, above: float = 0.0) -> list[int]:
        return [mask.kept(above) for mask in self.masks.values()]

    def _keep_highest(self) -> None:
        """Turns the highest variables on, as many as the target allows, and no others.

        Where those end is found by bisection: sorting them takes several times their memory.
        """
        low, high = -2 * self.options.bound, self.options.bound
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            kept = sum(self._kept(middle))
            low, high = (middle, high) if kept > self.allowed else (low, middle)
            if kept == self.allowed:
                break
        left = self.allowed - sum(self._kept(high))
        for mask in self.masks.values():
            left -= mask.keep_above(low, high, left)

    def _freeze(self) -> None:
        """Makes the masks final, at the target where there is one."""
        if self.options.target is not None:
            for mask in self.masks.values():  # one of each weight stays, whatever the others are
                mask.raise_highest(2 * self.options.bound)
            self._keep_highest()
        for mask in self.masks.values():
            mask.freeze()

    @property
    def _step(self) -> int:
        return int(self.module.get_buffer("_connectivity_step"))


def _price(budget: Budget, kept: float) -> float:
    """The pull of a budget on the fraction of connections kept."""
    excess: float = (kept / budget.goal) ** SHARPNESS
    return min(HIGHEST_PRICE, budget.multiplier * excess)
