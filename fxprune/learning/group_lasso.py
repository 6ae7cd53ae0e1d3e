"""Group lasso over neurons: a penalty on the norm of all weights that a neuron owns.

    penalty = strength * sum over neurons of sqrt(||weights of the neuron||^2 + 1e-8)

A neuron owns the connections that begin or end at it, in every weight, each once; biases are not
among them. Its gate is open until its norm has fallen below a fraction of what the neurons of its
group had on average in the beginning; then it is 0 and stays so.

Source: Wen et al., "Learning intrinsic sparse structures within long short-term memory",
https://arxiv.org/abs/1709.05027. There, inputs of the first layer belong to no group, and what is
zeroed are single weights below a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxprune.learning.candidates import Candidates
from fxprune.learning.neuron_gates import NeuronGates
from fxprune.masking.prunable import Weight
from fxprune.program import Kind

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["GroupLasso"]

EPS = 1e-8


class GroupLasso(NeuronGates):
    """Gates that close for good where the weights of a neuron have become small.

    Args:
        candidates: the neurons with a gate.
        program: what they belong to.
        weights: all weights of it.
        threshold: the norm below which a neuron goes, as a fraction of the mean norm that its
            group had.
    """

    open: Tensor
    norm: Tensor
    reference: Tensor

    def __init__(
        self, candidates: Candidates, program: Program, weights: Sequence[Weight], threshold: float
    ) -> None:
        super().__init__(candidates)
        self.threshold = threshold
        self.weights = tuple(
            (w.name, w.axes, _meetings(w))
            for w in weights
            if program.kinds[w.name] is Kind.PARAMETER
        )
        norm = self._norms({w.name: w.tensor.detach() for w in weights}).detach()
        self.register_buffer("norm", norm)
        self.register_buffer("open", torch.ones(len(candidates), dtype=torch.bool))
        total, members = (
            torch.zeros(len(candidates.floored)).index_add(0, candidates.group, v)
            for v in (norm, torch.ones_like(norm))
        )
        self.register_buffer("reference", (total / members.clamp(min=1))[candidates.group])

    def moving(self) -> Tensor:
        """The settled gates: nothing is random."""
        return self.settled()

    def scores(self) -> Tensor:
        """The norm of each neuron, as a fraction of the mean that its group had."""
        return torch.where(self.reference > 0, self.norm / self.reference, math.inf)

    def learned(self) -> Tensor:
        """1 for those that are open."""
        return self.open.float()

    def penalty(self, module: fx.GraphModule) -> Tensor:
        """The sum of the norms of neurons that are open, differentiable."""
        tensors = {name: module.get_parameter(name) for name, _, _ in self.weights}
        return self._norms(tensors)[self.open].sum()

    def measure(self, module: fx.GraphModule) -> Tensor:
        """That sum, as a fraction of what it was."""
        return self.penalty(module) / self.reference.sum()

    def goal(self, target: float) -> float:
        """Its root: where half the neurons are left, so is a quarter of their connections."""
        return math.sqrt(target)

    @torch.no_grad()
    def update(self, module: fx.GraphModule) -> None:
        """Closes gates whose neurons have become small."""
        tensors = {name: module.get_parameter(name) for name, _, _ in self.weights}
        self.norm.copy_(self._norms(tensors))
        self.open &= self.norm >= self.threshold * self.reference

    def _norms(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The norm of what each candidate owns, [n], in float32."""
        count = len(self.candidates.living)
        device = self.candidates.numbers.device
        squares = torch.zeros(count + 1, device=device)  # the last for positions of no neuron
        for name, axes, meetings in self.weights:
            square = tensors[name].float().square()
            for axis, (places, owners) in zip(axes, meetings, strict=True):
                dims = [d for d, n in enumerate(axis.shape) if n == 1 and square.shape[d] > 1]
                sums = square.sum(dims, keepdim=True) if dims else square
                ids = axis.to(device).expand(sums.shape).flatten() % (count + 1)
                squares = squares.index_add(0, ids, sums.flatten())
                if len(places):
                    twice = square.flatten()[places.to(device)]
                    squares = squares.index_add(0, owners.to(device), -twice)
        return (squares[self.candidates.numbers] + EPS).sqrt()


def _meetings(weight: Weight) -> list[tuple[Tensor, Tensor]]:
    """For each axis, which entries belong to the same neuron by an earlier one, and to which."""
    found = []
    for i, axis in enumerate(weight.axes):
        same = torch.zeros((), dtype=torch.bool)
        for earlier in weight.axes[:i]:
            same = same | ((axis == earlier) & (axis >= 0))
        places = same.expand(weight.tensor.shape).flatten().nonzero().flatten()
        found.append((places, axis.expand(weight.tensor.shape).flatten()[places]))
    return found
