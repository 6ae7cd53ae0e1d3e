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

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxprune.analysis.classes import LAYERS
from fxprune.analysis.walker import CONVOLUTIONS, operation_name
from fxprune.masking.branches import Branch, find_branches
from fxprune.masking.cutting import cut_connections, cut_neurons, scored
from fxprune.masking.scores import neuron_scores, position_scores
from fxprune.masking.selection import removal_count, select_lowest
from fxprune.program import Refusal

if TYPE_CHECKING:
    from fxprune.masking.prunable import Prunable, Weight
    from fxprune.policy import Protection
    from fxprune.program import Program

__all__ = ["NEURON_STRUCTURES", "STRUCTURES", "Selected", "Structure", "make_structure"]

POSITION_STRUCTURES = ("kernel-row", "kernel-column", "kernel", "row", "column")
NEURON_STRUCTURES = ("filter", "channel", "neuron")
STRUCTURES = ("connection", *POSITION_STRUCTURES, *NEURON_STRUCTURES, "depth")

Values = Mapping[str, Tensor]
"""The weights as they are at the moment, by name; buffers that serve as weights among them."""

Selected = tuple[Tensor, tuple[Refusal, ...]]
"""Which candidates go, bool [size], and what stays for a reason other than its score."""

_NONE = torch.empty(0, dtype=torch.int64)


class Structure(ABC):
    """All candidates of one kind in a program, numbered from 0.

    Attributes:
        name: the structure.
        size: number of candidates.
    """

    name: str
    size: int

    @abstractmethod
    def scores(self, values: Values) -> Tensor:
        """How much each candidate weighs, float [size] on the CPU, at least 0 or infinite."""

    @abstractmethod
    def lowest(self, scores: Tensor, sparsity: float) -> Selected:
        """The candidates that go: a fraction of those that compete, those with the lowest scores.

        What was masked when the structure was made does not compete, and does not go.
        """

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """The masks of tensors that keeping these candidates means, each broadcastable."""
        return {}

    def cut(self, keep: Tensor) -> Tensor:
        """The numbers of the neurons that dropping the other candidates cuts."""
        return _NONE

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """The value that each candidate computes, where candidates are parts of the graph."""
        return ()


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
        weights = tuple(_seen_from(name, w, found) for w in found.weights)
        rows = _weights_of(found, LAYERS) if name == "filter" else frozenset()
        return _Neurons(name, found.neurons.count, found, weights, scope, rows)
    if name == "depth":
        branches, refusals = find_branches(program, found.neurons, protection)
        return _Branches(name, len(branches), branches, refusals)
    kernels = _weights_of(found, CONVOLUTIONS)
    dims = tuple(position_dims(w, name, w.name in kernels) for w in found.maskable)
    able = [position_scores(w, d, 1)[1] for w, d in zip(found.maskable, dims, strict=True)]
    kept: list[Refusal] = []
    if name == "row":
        for i, weight in enumerate(found.maskable):
            fixed = _rows_of_fixed_neurons(weight, dims[i], found)
            if bool(fixed.any()):
                able[i] &= ~fixed
                kept.append(
                    Refusal(weight.name, f"{int(fixed.sum())} rows stay, as their neurons must")
                )
    every = torch.cat([torch.zeros(0, dtype=torch.bool), *able])
    return _Positions(name, len(every), found, dims, every, scope, tuple(kept))


def position_dims(weight: Weight, structure: str, kernel: bool) -> tuple[int, ...]:
    """The dimensions of a weight along which its candidates are numbered.

    Args:
        weight: the weight.
        structure: a position structure.
        kernel: whether its dimensions from the third on are those of a kernel.
    """
    every = tuple(range(weight.tensor.dim()))
    if structure == "row":
        return weight.output_dims
    if structure == "column":
        return tuple(d for d in every if d not in weight.output_dims)
    if not kernel:
        return every
    if structure == "kernel":
        return every[:2]
    if structure == "kernel-row":
        return every[:-1]
    return (*every[:-2], every[-1]) if len(every) > 3 else every  # a kernel of one row


def _rows_of_fixed_neurons(weight: Weight, dims: tuple[int, ...], found: Prunable) -> Tensor:
    """Which rows lead to neurons that are to stay: without theirs, an output would be constant."""
    fixed = torch.zeros([n if d in dims else 1 for d, n in enumerate(weight.tensor.shape)]).bool()
    for axis in _seen_from("filter", weight, found).axes:
        if set(_varying(axis)) <= set(dims):
            fixed |= (axis >= 0) & ~found.neurons.free[axis.clamp(min=0)]
    return fixed.flatten()


def _weights_of(found: Prunable, operations: Collection[str]) -> frozenset[str]:
    """The weights that such operations read."""
    return frozenset(
        name
        for b in found.neurons.blocks
        if operation_name(b.consumer) in operations
        for name in b.weights
    )


def _seen_from(structure: str, weight: Weight, found: Prunable) -> Weight:
    """The weight with the neurons that it counts for: those it enters, leaves, or both."""
    if structure == "neuron":
        return weight
    blocks = [b for b in found.neurons.blocks if weight.name in b.weights]
    if all(b.direct for b in blocks):
        ends = [b.destinations if structure == "filter" else b.sources for b in blocks]
        axes = [a for i, a in enumerate(ends) if not any(torch.equal(a, b) for b in ends[:i])]
    else:  # read rearranged: by the dimension that outputs lie along
        out = [set(_varying(a)) <= set(weight.output_dims) for a in weight.axes]
        axes = [a for a, o in zip(weight.axes, out, strict=True) if o == (structure == "filter")]
    return replace(weight, axes=tuple(a for a in axes if bool((a >= 0).any())))


def _varying(axis: Tensor) -> tuple[int, ...]:
    return tuple(d for d, size in enumerate(axis.shape) if size > 1)


def _updated(weights: Sequence[Weight], values: Values) -> list[Weight]:
    return [replace(w, tensor=values[w.name]) for w in weights]


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
class _Positions(Structure):
    """Positions along some dimensions of each weight."""

    name: str
    size: int
    found: Prunable
    dims: tuple[tuple[int, ...], ...]
    able: Tensor
    scope: str
    kept: tuple[Refusal, ...]

    def scores(self, values: Values) -> Tensor:
        weights = _updated(self.found.maskable, values)
        return _flat([position_scores(w, d, 1)[0] for w, d in zip(weights, self.dims, strict=True)])

    def lowest(self, scores: Tensor, sparsity: float) -> Selected:
        weights = self.found.maskable
        goes, able = torch.zeros(self.size, dtype=torch.bool), self.able
        if not bool(able.any()):
            return goes, (*self.found.kept_weights, *self.kept)
        group = torch.repeat_interleave(torch.tensor([_positions(s) for s in self._shapes()]))
        kinds = sorted({w.connection_class for w in weights})
        classes = torch.tensor([kinds.index(w.connection_class) for w in weights])
        rivals = {"group": group, "class": classes[group]}.get(self.scope, torch.zeros_like(group))
        floor = torch.ones(len(weights), dtype=torch.bool)
        goes[able], floored = select_lowest(
            scores[able], rivals[able], group[able], floor, sparsity
        )
        kept = (_best_kept(weights[i].name) for i in floored.nonzero().flatten().tolist())
        return goes, (*self.found.kept_weights, *self.kept, *kept)

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        shapes = self._shapes()
        parts = keep.split([_positions(s) for s in shapes]) if shapes else ()
        weights = self.found.maskable
        return {w.name: p.view(s) for w, p, s in zip(weights, parts, shapes, strict=True)}

    def _shapes(self) -> list[tuple[int, ...]]:
        return [
            tuple(n if d in along else 1 for d, n in enumerate(w.tensor.shape))
            for w, along in zip(self.found.maskable, self.dims, strict=True)
        ]


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
        return neuron_scores(_updated(self.weights, values), self.size, 1)

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


def _positions(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _best_kept(name: str) -> Refusal:
    return Refusal(name, "kept its best one, though it was among the lowest: none may go empty")
