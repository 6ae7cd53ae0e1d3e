"""Group lasso over neurons: a penalty on the norm of all weights that a neuron owns.

    penalty = strength * sum over neurons of sqrt(||weights of the neuron||^2 + 1e-8) / reference

A neuron owns the connections that begin or end at it, in every weight, each once; biases are not
among them. The reference is what the neurons of its group had on average in the beginning. Without
it an embedding, whose weights begin forty times as large as those of a layer of 512 units, is
pulled so much harder that Adam closes all of it but one channel. A gate is open until the norm has
fallen below a fraction of the reference; then it is 0 and stays so. A group that begins at 0 is not
judged.

Source: Wen et al., "Learning intrinsic sparse structures within long short-term memory",
https://arxiv.org/abs/1709.05027. There, inputs of the first layer belong to no group, and what is
zeroed are single weights below a threshold. The reference is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from fxprune.learning.candidates import Candidates
from fxprune.learning.neuron_gates import NeuronGates
from fxprune.learning.precise import Precise
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
        trained = [w for w in weights if program.kinds[w.name] is Kind.PARAMETER]
        self.names = tuple(w.name for w in trained)
        self.weights = nn.ModuleList(_Owned(w) for w in trained)
        norm = self._norms({w.name: w.tensor.detach().cpu() for w in weights})
        self.register_buffer("norm", norm)
        self.register_buffer("open", torch.ones(len(candidates), dtype=torch.bool))
        total, members = (
            norm.new_zeros(len(candidates.floored)).index_add(0, candidates.group, v)
            for v in (norm, torch.ones_like(norm))
        )
        self.register_buffer("reference", (total / members.clamp(min=1))[candidates.group])

    def moving(self) -> Tensor:
        """The settled gates: nothing is random."""
        return self.settled()

    def scores(self) -> Tensor:
        """The norm of each neuron, as a fraction of the mean that its group had."""
        return torch.where(self.judged, self.norm / self.reference, math.inf)

    def learned(self) -> Tensor:
        """1 for those that are open."""
        return self.open.float()

    def penalty(self, module: fx.GraphModule) -> Tensor:
        """The sum of the norms of neurons that are open, as such fractions, differentiable."""
        relative = self._norms(dict(module.named_parameters())) / self.reference
        return relative[self.open & self.judged].sum()

    def measure(self, module: fx.GraphModule) -> Tensor:
        """That sum, as a fraction of what it was."""
        return self.penalty(module) / self.judged.sum().clamp(min=1)

    @property
    def judged(self) -> Tensor:
        """Which neurons are of a group that did not begin at 0."""
        return self.reference > 2 * math.sqrt(EPS)

    def goal(self, target: float) -> float:
        """Its root: where half the neurons are left, so is a quarter of their connections."""
        return math.sqrt(target)

    @torch.no_grad()
    def update(self, module: fx.GraphModule) -> None:
        """Closes gates whose neurons have become small."""
        self.norm.copy_(self._norms(dict(module.named_parameters())))
        self.open &= self.norm >= self.threshold * self.reference

    def _norms(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The norm of what each candidate owns, [n], in float32."""
        numbers, count = self.candidates.numbers, len(self.candidates.living)
        # The last: of no neuron.
        squares = torch.zeros(count + 1, dtype=torch.float32, device=numbers.device)
        for name, owned in zip(self.names, self.weights, strict=True):
            squares = owned(squares, tensors[name])
        return (squares[numbers] + EPS).sqrt()


class _Owned(Precise):
    """Who owns the entries of a weight."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.axes = len(weight.axes)
        for i, axis in enumerate(weight.axes):
            # Entries that belong to the same neuron by an earlier axis are counted there.
            same = torch.zeros((), dtype=torch.bool)
            for earlier in weight.axes[:i]:
                same = same | ((axis == earlier) & (axis >= 0))
            places = same.expand(weight.tensor.shape).flatten().nonzero().flatten()
            owners = axis.expand(weight.tensor.shape).flatten()[places]
            for name, ids in (("axis", axis), ("places", places), ("owners", owners)):
                self.register_buffer(f"{name}_{i}", ids.contiguous(), persistent=False)

    def forward(self, squares: Tensor, weight: Tensor) -> Tensor:
        """Adds the squares of the weight to those of the neurons, [count + 1]."""
        square = weight.float().square()
        for i in range(self.axes):
            axis, places = self.get_buffer(f"axis_{i}"), self.get_buffer(f"places_{i}")
            dims = [d for d, n in enumerate(axis.shape) if n == 1 and square.shape[d] > 1]
            sums = square.sum(dims, keepdim=True) if dims else square
            ids = axis.expand(sums.shape).flatten() % len(squares)
            squares = squares.index_add(0, ids, sums.flatten())
            if len(places):
                counted = square.flatten()[places]
                squares = squares.index_add(0, self.get_buffer(f"owners_{i}"), -counted)
        return squares
