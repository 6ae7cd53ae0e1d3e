"""Structures: which connections are kept or dropped together.

With a convolution's weight ``V[o, i, r, c]`` (one of any other operation is the 1x1 case):

| structure | one candidate |
|---|---|
| ``connection`` | ``V[o,i,r,c]`` |
| ``kernel-row``, ``kernel-column`` | ``V[o,i,r,:]``, ``V[o,i,:,c]``: a row or column of a kernel |
| ``kernel`` | ``V[o,i,:,:]``: one two-dimensional filter |
| ``row``, ``column`` | ``V[o,:,:,:]``, ``V[:,i,r,c]``: of the weight as a matrix, see below |
| ``filter`` | a neuron, judged by the weights that enter it: ``V[o,:,:,:]`` |
| ``channel`` | a neuron, judged by the weights that leave it: ``V[:,i,:,:]`` |
| ``neuron`` | a neuron, judged by both |
| ``depth`` | a residual branch, see :mod:`fxprune.masking.branches` |

All above the line of ``filter`` mask entries of one weight. ``row`` and ``column`` are those of
the matrix that the weight is multiplied as: outputs by all else; a recurrent layer's row is that
of one gate. Rows stay whose neurons must, such as the outputs of the model. The next three drop
neurons: whatever leaves the neuron goes, its bias with it, on a recurrent layer through all gates;
neurons that a sum ties together are one. A candidate's score is the mean magnitude of its weights.

Never all go: each group of neurons, and each weight under a position structure, keeps its best.

Source: Hu et al., "Dynamic pruning on multiple sparse structures", IEEE Access 2023,
https://doi.org/10.1109/access.2023.3267469; what a score is and how many compete is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxprune.analysis.classes import LAYERS
from fxprune.masking.branches import Branch, find_branches
from fxprune.masking.cutting import cut_connections, cut_neurons, scored
from fxprune.masking.ends import seen_from, weights_of
from fxprune.masking.positions import POSITION_STRUCTURES, make_positions
from fxprune.masking.scores import neuron_scores
from fxprune.masking.selection import removal_count
from fxprune.masking.structure import Selected, Structure, Values, at_values
from fxprune.program import Refusal

if TYPE_CHECKING:
    from fxprune.masking.prunable import Prunable, Weight
    from fxprune.policy import Protection
    from fxprune.program import Program

__all__ = ["NEURON_STRUCTURES", "STRUCTURES", "make_structure"]

NEURON_STRUCTURES = ("filter", "channel", "neuron")
STRUCTURES = ("connection", *POSITION_STRUCTURES, *NEURON_STRUCTURES, "depth")


def make_structure(
    name: str, program: Program, found: Prunable, protection: Protection, scope: str
) -> Structure:
    """Finds the candidates of a structure.

    Args:
        name: one of :data:`STRUCTURES`.
        program: what is to be pruned.
        found: what of it may be.
        protection: what the user protects.
        scope: which candidates compete, see :mod:`fxprune.masking.cutting`. Branches all do.
    """
    if name == "connection":
        return _Connections(name, sum(w.tensor.numel() for w in found.maskable), found, scope)
    if name in NEURON_STRUCTURES:
        weights = tuple(seen_from(name, w, found) for w in found.weights)
        rows = weights_of(found, LAYERS) if name == "filter" else frozenset()
        return _Neurons(name, found.neurons.count, found, weights, scope, rows)
    if name == "depth":
        branches, refusals = find_branches(program, found.neurons, protection)
        return _Branches(name, len(branches), branches, refusals)
    return make_positions(name, found, scope, 1)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in parts]) if parts else torch.zeros(0)


@dataclass(frozen=True)
class _Connections(Structure):
    """Every entry of every weight."""

    name: str
    size: int
    found: Prunable
    scope: str

    def scores(self, values: Values) -> Tensor:
        parts = [values[w.name].detach().abs().cpu() for w in self.found.maskable]
        return _flat([p if p.dtype == torch.float64 else p.float() for p in parts])

    def lowest(self, scores: Tensor, sparsity: float) -> Selected:
        weights = scored(self.found.maskable, self._by_weight(scores))
        keep = cut_connections(weights, sparsity, self.scope)
        parts = [~keep[w.name] if w.name in keep else torch.zeros_like(w.tensor) for w in weights]
        return _flat([p.bool() for p in parts]).bool(), self.found.kept_weights

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        return self._by_weight(keep)

    def _by_weight(self, flat: Tensor) -> dict[str, Tensor]:
        weights = self.found.maskable
        parts = flat.split([w.tensor.numel() for w in weights]) if weights else ()
        return {w.name: p.view(w.tensor.shape) for w, p in zip(weights, parts, strict=True)}


@dataclass(frozen=True)
class _Neurons(Structure):
    """Neurons, judged by some or all of their weights; the rows of some may be masked with them."""

    name: str
    size: int
    found: Prunable
    weights: tuple[Weight, ...]
    scope: str
    rows: frozenset[str]

    def scores(self, values: Values) -> Tensor:
        return neuron_scores(at_values(self.weights, values), self.size, 1)

    def lowest(self, scores: Tensor, sparsity: float) -> Selected:
        goes = torch.zeros(self.size, dtype=torch.bool)
        numbers, kept = cut_neurons(self.found, scores, sparsity, self.scope)
        goes[numbers] = True
        return goes, kept

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        maskable = {w.name for w in self.found.maskable} & self.rows
        return {
            w.name: reduce(and_, (keep[a.clamp(min=0)] | (a < 0) for a in w.axes))
            for w in self.weights
            if w.name in maskable and w.axes
        }

    def cut(self, keep: Tensor) -> Tensor:
        return (~keep).nonzero().flatten()


@dataclass(frozen=True)
class _Branches(Structure):
    """Residual branches, judged by all of their weights."""

    name: str
    size: int
    branches: tuple[Branch, ...]
    refusals: tuple[Refusal, ...]

    def scores(self, values: Values) -> Tensor:
        return torch.tensor(
            [
                sum(float(values[n].detach().double().abs().sum()) for n in b.weights)
                / sum(values[n].numel() for n in b.weights)
                for b in self.branches
            ],
            dtype=torch.float64,
        )

    def lowest(self, scores: Tensor, sparsity: float) -> Selected:
        goes, count = torch.zeros(self.size, dtype=torch.bool), removal_count(sparsity, self.size)
        goes[scores.argsort(stable=True)[:count]] = True
        if count or not self.size or sparsity == 0:
            return goes, self.refusals
        reason = f"all {self.size} stay: {sparsity:g} of them is less than one"
        return goes, (*self.refusals, Refusal("residual branches", reason))

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for branch, stays in zip(self.branches, keep, strict=True):
            for name, dim in branch.outputs.items():
                masks[name] = stays.reshape((1,) * dim)
        return masks

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        return tuple(branch.end for branch in self.branches)
