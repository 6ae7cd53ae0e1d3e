"""Positions: rows, columns and kernels, numbered along some dimensions of each weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxprune.analysis.walker import CONVOLUTIONS
from fxprune.masking.ends import seen_from, varying, weights_of
from fxprune.masking.scores import position_scores
from fxprune.masking.selection import floor_refusals, select_lowest
from fxprune.masking.structure import Selected, Structure, Values, at_values
from fxprune.program import Refusal

if TYPE_CHECKING:
    from fxprune.masking.prunable import Prunable, Weight

__all__ = ["POSITION_STRUCTURES", "make_positions"]

POSITION_STRUCTURES = ("kernel-row", "kernel-column", "kernel", "row", "column")


def make_positions(name: str, found: Prunable, scope: str, norm: int) -> Structure:
    """Finds the candidates of one of :data:`POSITION_STRUCTURES`.

    Args:
        name: the structure.
        found: what may be pruned.
        scope: which candidates compete, see :mod:`fxprune.masking.cutting`.
        norm: the power of the magnitudes that a score is the mean of, 1 or 2.
    """
    kernels = weights_of(found, CONVOLUTIONS)
    dims = tuple(_dims_of(w, name, w.name in kernels) for w in found.maskable)
    able = [position_scores(w, d, norm)[1] for w, d in zip(found.maskable, dims, strict=True)]
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
    return _Positions(name, len(every), found, dims, every, scope, norm, tuple(kept))


def _dims_of(weight: Weight, structure: str, kernel: bool) -> tuple[int, ...]:
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
    for axis in seen_from("filter", weight, found).axes:
        if set(varying(axis)) <= set(dims):
            fixed |= (axis >= 0) & ~found.neurons.free[axis.clamp(min=0)]
    return fixed.flatten()


@dataclass(frozen=True)
class _Positions(Structure):
    """Positions along some dimensions of each weight."""

    name: str
    size: int
    found: Prunable
    dims: tuple[tuple[int, ...], ...]
    able: Tensor
    scope: str
    norm: int
    kept: tuple[Refusal, ...]

    def scores(self, values: Values) -> Tensor:
        weights = at_values(self.found.maskable, values)
        parts = [
            position_scores(w, d, self.norm)[0] for w, d in zip(weights, self.dims, strict=True)
        ]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])

    def lowest(self, scores: Tensor, sparsity: float) -> Selected:
        weights = self.found.maskable
        goes, able = torch.zeros(self.size, dtype=torch.bool), self.able
        if not bool(able.any()):
            return goes, (*self.found.kept_weights, *self.kept)
        group = torch.repeat_interleave(torch.tensor([_count(s) for s in self._shapes()]))
        kinds = sorted({w.connection_class for w in weights})
        classes = torch.tensor([kinds.index(w.connection_class) for w in weights])
        rivals = {"group": group, "class": classes[group]}.get(self.scope, torch.zeros_like(group))
        floor = torch.ones(len(weights), dtype=torch.bool)
        goes[able], floored = select_lowest(
            scores[able], rivals[able], group[able], floor, sparsity
        )
        best = floor_refusals([w.name for w in weights], floored)
        return goes, (*self.found.kept_weights, *self.kept, *best)

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        shapes = self._shapes()
        parts = keep.split([_count(s) for s in shapes]) if shapes else ()
        weights = self.found.maskable
        return {w.name: p.view(s) for w, p, s in zip(weights, parts, shapes, strict=True)}

    def _shapes(self) -> list[tuple[int, ...]]:
        return [
            tuple(n if d in along else 1 for d, n in enumerate(w.tensor.shape))
            for w, along in zip(self.found.maskable, self.dims, strict=True)
        ]


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
