"""The neurons that a method selects among: where they are, what stays of them, what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fxprune.analysis.neurons import ConnectionClass
from fxprune.learning.precise import Precise

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Neurons
    from fxprune.learning.cost import Cost
    from fxprune.masking.prunable import Prunable

__all__ = ["SCOPES", "Candidates"]

SCOPES = ("recurrent", "all")


class Candidates(Precise):
    """Neurons that may go, but not all of a group where no other neuron of it stays.

    Args:
        found: what may be pruned.
        scope: "recurrent", the neurons of recurrent layers and cells and those that feed them; or
            "all".

    Attributes:
        numbers: of these neurons, ascending, int64 [n].
        group: to which group each belongs, int64 [n].
        floored: which groups must keep one of them, bool [groups].
        living: which neurons of the program there are now, bool [count].
    """

    numbers: Tensor
    group: Tensor
    floored: Tensor
    living: Tensor

    def __init__(self, found: Prunable, scope: Literal["recurrent", "all"]) -> None:
        super().__init__()
        neurons = found.neurons
        group_of = neurons.group_of()
        chosen = found.candidates & (group_of >= 0)
        if scope == "recurrent":
            chosen = chosen & _recurrent(neurons)
        numbers = chosen.nonzero().flatten()
        staying = found.living & ~chosen
        floored = [
            bool(chosen[g.neurons].any()) and not bool(staying[g.neurons].any())
            for g in neurons.groups
        ]
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("group", group_of[numbers], persistent=False)
        self.register_buffer("floored", torch.tensor(floored, dtype=torch.bool), persistent=False)
        self.register_buffer("living", found.living, persistent=False)

    def __len__(self) -> int:
        return len(self.numbers)

    def flags(self) -> Tensor:
        """Which neurons of the program are candidates, bool [count]."""
        return torch.zeros_like(self.living).index_fill(0, self.numbers, True)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the candidates [n] among all neurons, [count]: 1 where one stays, 0 if gone."""
        return self.living.to(values.dtype).index_copy(0, self.numbers, values)

    def best(self, scores: Tensor) -> Tensor:
        """The highest of each group that must keep one, the first of equals: bool [n]."""
        groups, count = len(self.floored), len(scores)
        top = scores.new_full((groups,), -torch.inf).scatter_reduce(0, self.group, scores, "amax")
        places = torch.arange(count, device=scores.device)
        places = torch.where(scores == top[self.group], places, count)
        first = places.new_full((groups,), count).scatter_reduce(0, self.group, places, "amin")
        best = torch.zeros(count + 1, dtype=torch.bool, device=scores.device)
        best[first[self.floored]] = True
        return best[:-1]

    def lacking(self, there: Tensor, scores: Tensor) -> Tensor:
        """Which must be put back, bool [n]: the best of the groups of which none is there."""
        groups = torch.zeros(len(self.floored), device=there.device)
        some = groups.index_add(0, self.group, there.to(groups)) > 0
        return self.best(scores) & ~some[self.group]

    def share(self, cost: Cost, there: Tensor) -> Tensor:
        """What is left of the cost if these are there, a differentiable scalar in float64.

        Args:
            cost: of the program.
            there: the probability of each candidate, [n].
        """
        before = cost.expected(self.living.to(there.dtype))
        return cost.expected(self.spread(there)) / before

    def least(self, cost: Cost) -> float:
        """What is left of the cost if one of each group is there."""
        return float(self.share(cost, self.best(torch.zeros(len(self))).double()))

    def within(self, scores: Tensor, cost: Cost, limit: float) -> Tensor:
        """The highest, as many as a share of the cost allows: bool [n].

        Args:
            scores: [n].
            cost: of the program.
            limit: of its share; where even one of each group is more, one of each group stays.
        """
        order = torch.where(self.best(scores), torch.inf, scores).argsort(stable=True)
        everything = torch.ones_like(scores, dtype=torch.bool)

        def without(number: int) -> Tensor:
            return everything.index_fill(0, order[:number], False)

        fewest, most = 0, len(self) - int(self.best(scores).sum())
        while fewest < most:
            middle = (fewest + most) // 2
            if float(self.share(cost, without(middle).double())) <= limit:
                most = middle
            else:
                fewest = middle + 1
        return without(most)


def _recurrent(neurons: Neurons) -> Tensor:
    """Units of recurrent layers, and neurons that connections of the input class come from."""
    chosen = torch.zeros(neurons.count, dtype=torch.bool)
    for group in neurons.groups:
        if group.recurrent:
            chosen[group.neurons] = True
    for block in neurons.blocks:
        if block.connection_class is ConnectionClass.INPUT:
            chosen[block.sources[block.sources >= 0]] = True
    return chosen
