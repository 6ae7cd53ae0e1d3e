"""Sensitivity pruning: what the loss feels least goes, in one shot; then fine-tune.

Two criteria, per connection:
    1. ``std``: |W| against a threshold of its own matrix,
           t = threshold * std(|W|);  while fewer than floor * n stay:  t <- 0.99 t
           stays where |w| >= t
       with the population standard deviation over the n connections that are left.
    2. ``gradient``: c = sum over mini-batches of |w dL/dw|, the first-order change of the loss
       when the connection goes. The lowest floor(sparsity * n + 1e-9) of n go, but the best of
       each row stays (in recurrent layers a unit has one row per gate), so that no neuron and no
       gate starves.

Structure ``neuron`` sums the sensitivities of the connections a neuron owns, those that begin or
end at it, and cuts the neurons with the lowest sums. There ``std`` means |w| / std(|W|).

Biases stay. The gradient criterion needs a task for its loss and batches, and only for that: the
pass trains nothing itself, so the pipeline fine-tunes after it as after any one-shot pass.

Sources: Tang et al., "SCGRU: one-shot pruning of gated recurrent units", Neurocomputing 2022, for
``std``; Lee, Ajanthan, Torr, "SNIP", https://arxiv.org/abs/1810.02340, for ``gradient``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from fxprune.contract import (
    Effect,
    Facts,
    NeuronAnalysis,
    Pass,
    PassResult,
    Refusal,
    check_choice,
    check_count,
    check_idle,
    check_number,
)
from fxprune.errors import PreconditionError
from fxprune.masking.cutting import (
    SCOPES,
    cut_connections,
    cut_neurons,
    require_free_neurons,
    scored,
)
from fxprune.masking.prunable import Weight, find_prunable
from fxprune.policy import protected
from fxprune.program import Program
from fxprune.training.saliency import gradient_scores

__all__ = ["Sensitivity"]


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Removes, once, the connections or neurons to which the loss is least sensitive.

    Attributes:
        criterion: what measures sensitivity: "std" (default), the weight against the spread of
            its matrix; "gradient", the change of the task's loss, which needs a task.
        threshold: for "std": in standard deviations of the magnitudes; 2 by default.
        floor: for "std": the least fraction of each matrix that stays; 0.05 by default.
        sparsity: for "gradient" and for neurons: the fraction to remove, in [0, 1); 0.75 by
            default.
        scope: for "gradient" and for neurons: among what the fraction is taken: "group" (default),
            each weight, or each neuron group, for itself; "class", each connection class (for
            neurons: recurrent ones and the rest); "global", all.
        batches: for "gradient": how many mini-batches of ``Task.train`` are used, 16 by default;
            one pass over them where there are fewer.
        structure: what is removed: "connection" (default) or "neuron".
        row_floor: for "gradient" and connections: whether the best connection of each row stays,
            true by default. Where few are to stay, the floor takes most of them.

    Raises:
        ConfigError: an option is out of range, or has no effect with the others.

    Example:
        >>> str(Sensitivity("gradient", sparsity=0.95, scope="global"))
        'sensitivity{criterion=gradient,sparsity=0.95,scope=global}'
    """

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})

    criterion: Literal["std", "gradient"] = "std"
    threshold: float = 2.0
    floor: float = 0.05
    sparsity: float = 0.75
    scope: Literal["group", "global", "class"] = "group"
    batches: int = 16
    structure: Literal["connection", "neuron"] = "connection"
    row_floor: bool = True

    @classmethod
    def published(cls) -> Self:
        """The setting of the authors of SCGRU: threshold 3.754, floor 0.01.

        Nothing of a uniformly distributed matrix reaches that threshold: there the floor decides.
        """
        return cls("std", threshold=3.754, floor=0.01)

    def __post_init__(self) -> None:
        check_choice(self, "criterion", ("std", "gradient"))
        check_choice(self, "structure", ("connection", "neuron"))
        check_choice(self, "scope", SCOPES)
        check_choice(self, "row_floor", (True, False))
        check_number(self, "threshold", 0, math.inf)
        check_number(self, "floor", 0, 1)
        check_number(self, "sparsity", 0, 1)
        check_count(self, "batches")
        idle = {"sparsity", "scope"} if self._by_threshold else {"threshold", "floor"}
        if self.criterion == "std":
            idle |= {"batches", "row_floor"}
        elif self.structure == "neuron":
            idle.add("row_floor")
        check_idle(self, idle, f"criterion={self.criterion} and structure={self.structure}")

    @property
    def _by_threshold(self) -> bool:
        return self.criterion == "std" and self.structure == "connection"

    def requires(self, program: Program, facts: Facts) -> None:
        """The gradient needs a task; where neurons are to go, some neuron must be free to.

        Raises:
            PreconditionError: there is no task, or every neuron is frozen.
        """
        if self.criterion == "gradient" and facts.context.task is None:
            raise PreconditionError(
                "criterion 'gradient' needs a loss and batches, and there is no task. Give one: "
                "task=fxprune.Task(...), or on the command line a package.module:function that "
                "returns it; or choose criterion 'std', which looks at weights only.",
                pass_name=self.name,
            )
        if self.structure == "neuron" and self.sparsity > 0:
            require_free_neurons(facts[NeuronAnalysis], self.name)

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Adds to the masks of the program."""
        neurons, masks = facts[NeuronAnalysis], program.masks
        found = find_prunable(program, neurons, protected(program, neurons, facts.context.protect))
        if self._by_threshold:
            keep, reasons = _above_threshold(found.maskable, self.threshold, self.floor)
            masks, refusals = masks.cut_connections(keep), (*found.kept_weights, *reasons)
        else:
            scores = self._scores(program, facts, found.weights)
            if self.structure == "neuron":
                sums = _neuron_sums(scored(found.weights, scores), neurons.count)
                cut, refusals = cut_neurons(found, sums, self.sparsity, self.scope)
                masks = masks.cut_neurons(cut)
            else:
                keep, reasons = self._lowest(scored(found.maskable, scores))
                masks, refusals = masks.cut_connections(keep), (*found.kept_weights, *reasons)
        return PassResult.masking(program, masks, refusals)

    def _scores(
        self, program: Program, facts: Facts, weights: Sequence[Weight]
    ) -> dict[str, Tensor]:
        if self.criterion == "std":
            return {w.name: _deviations(w) for w in weights}
        task = facts.context.task
        assert task is not None  # by `requires`
        names = [w.name for w in weights]
        return gradient_scores(program, facts[NeuronAnalysis], names, task, self.batches)

    def _lowest(self, weights: tuple[Weight, ...]) -> Chosen:
        """The lowest go; where that would empty rows, others do instead of the best of each row."""
        keep = cut_connections(weights, self.sparsity, self.scope)
        if not self.row_floor:
            return keep, []
        best = {w.name: _best_of_rows(w) for w in weights}
        starving = {n: count for n in keep if (count := int((best[n] & ~keep[n]).sum()))}
        if not starving:
            return keep, []
        spared = {w.name: w.tensor.masked_fill(best[w.name], torch.inf) for w in weights}
        keep = cut_connections(scored(weights, spared), self.sparsity, self.scope)
        reasons = [
            Refusal(name, f"kept the best connection of {count} rows that would have gone empty")
            for name, count in starving.items()
        ]
        return {name: mask | best[name] for name, mask in keep.items()}, reasons


Chosen = tuple[dict[str, Tensor], list[Refusal]]
"""Which connections of each weight stay, and what was kept for another reason than its score."""


# By the spread of the weights ---------------------------------------------------------------------


def _above_threshold(weights: Iterable[Weight], threshold: float, floor: float) -> Chosen:
    keep, reasons = {}, []
    for weight in weights:
        values, left = _values(weight)
        judged = values[left]
        if not bool(judged.isfinite().all()):
            reasons.append(Refusal(weight.name, "it has values that are not finite"))
            continue
        if not len(judged):
            continue
        t = threshold * float(judged.std(correction=0))
        by_threshold = float((judged >= t).double().mean())
        if by_threshold < floor:
            t = _lowered(t, judged, max(1, math.ceil(floor * len(judged) - 1e-9)))
            kept = float((judged >= t).double().mean())
            reasons.append(
                Refusal(
                    weight.name,
                    f"the floor kept {kept:.2%} of it; the threshold alone would have kept "
                    f"{by_threshold:.2%}",
                )
            )
        keep[weight.name] = (values >= t) | ~left
    return {name: mask for name, mask in keep.items() if not bool(mask.all())}, reasons


def _lowered(t: float, values: Tensor, least: int) -> float:
    """The threshold, times 0.99 until at least so many values reach it."""
    reached = float(values.topk(least).values[-1])
    if reached < sys.float_info.min:  # no product ever gets to 0, nor well among subnormal numbers
        return reached
    while t > reached:
        t = min(0.99 * t, sys.float_info.max)
    return t


def _deviations(weight: Weight) -> Tensor:
    """|w| in standard deviations of the matrix; 0 where a connection is gone."""
    values, left = _values(weight)
    spread = float(values[left].std(correction=0)) if bool(left.any()) else 0.0
    return torch.where(left, values / (spread or 1.0), 0.0)


def _values(weight: Weight) -> tuple[Tensor, Tensor]:
    """The magnitudes of a weight, float64, and which of its connections there still are."""
    values, left = [], []
    for part in weight.entries():
        values.append(part.magnitudes.double())
        open_ = part.open
        left.append(torch.ones_like(values[-1], dtype=torch.bool) if open_ is None else open_)
    return torch.cat(values), torch.cat(left)


# Selection ----------------------------------------------------------------------------------------


def _best_of_rows(weight: Weight) -> Tensor:
    """The highest score at each position along the outputs, bool of the weight's shape.

    Of equals the last, which is the last to go.
    """
    values, left = _values(weight)
    order = [*weight.output_dims, *(d for d in range(values.dim()) if d not in weight.output_dims)]
    ranked = torch.where(left, values, -1.0).permute(order)
    rows = ranked.reshape(math.prod(ranked.shape[: len(weight.output_dims)]), -1)  # [rows, rest]
    highest, from_end = rows.flip(1).max(dim=1, keepdim=True)
    at = rows.shape[1] - 1 - from_end
    best = torch.zeros_like(rows, dtype=torch.bool).scatter(1, at, highest >= 0)
    back = torch.tensor(order).argsort().tolist()
    return best.reshape(ranked.shape).permute(back)


def _neuron_sums(weights: Iterable[Weight], count: int) -> Tensor:
    """Scores summed over the connections that begin or end at each neuron, float64 [count].

    A connection from a recurrent neuron to itself counts once. Infinite for neurons without any.
    """
    sums = torch.zeros(count, dtype=torch.float64)
    owning = torch.zeros(count, dtype=torch.bool)
    for weight in weights:
        for part in weight.entries():
            for i, axis in enumerate(part.axes):
                own = part.magnitudes.double()
                for earlier in part.axes[:i]:
                    own = own * (axis != earlier)
                at = axis >= 0
                sums.index_add_(0, axis[at], own.sum_to_size(axis.shape)[at])
                owning[axis[at]] = True
    return sums.where(owning, torch.inf)
