"""Scores by magnitude, of neurons and of rows and columns of weights.

Both are taken of the program as it would be after shrinking: connections of neurons that are gone
do not count at all, masked connections count as zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fxprune.masking.prunable import Entries, Weight

__all__ = ["neuron_scores", "position_scores"]


def neuron_scores(weights: Iterable[Weight], count: int, norm: int) -> Tensor:
    """The mean of ``|w| ** norm`` over the weights each neuron owns.

    A neuron owns the connections that end or begin at it, each once: one from a recurrent neuron
    to itself, and one of a tied weight, are one weight.

    Args:
        weights: all weights.
        count: number of neurons.
        norm: 1 or 2.

    Returns:
        float64 [count]; infinite for neurons that own no weight.
    """
    sums = torch.zeros(count, dtype=torch.float64)
    owned = torch.zeros(count, dtype=torch.float64)
    for weight in weights:
        overlaps = _overlaps(weight.axes)
        for part in weight.entries():
            powers, living = _powers(part, norm)
            for i, axis in enumerate(part.axes):
                first = living
                for j in overlaps[i]:
                    first = first & (axis != part.axes[j])
                at, ids = axis >= 0, axis[axis >= 0]
                sums.index_add_(0, ids, _sum_to(powers * first, axis)[at])
                owned.index_add_(0, ids, _sum_to(first.double(), axis)[at])
    return torch.where(owned > 0, sums / owned, torch.inf)


def position_scores(weight: Weight, dims: tuple[int, ...], norm: int) -> tuple[Tensor, Tensor]:
    """The mean of ``|w| ** norm`` at each position along some dimensions of a weight.

    Args:
        weight: the weight.
        dims: the dimensions that make up a position; all others are averaged over.
        norm: 1 or 2.

    Returns:
        Scores, float64 [positions] (row-major over ``dims``), 0 where nothing is left; and whether
        any connection is left to mask at each, bool [positions].
    """
    shape = [n if d in dims else 1 for d, n in enumerate(weight.tensor.shape)]
    sums, living, left = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for part in weight.entries():
        at = part.rows if 0 in dims else slice(0, 1)
        powers, alive = _powers(part, norm)
        remaining = alive if part.unmasked is None else alive & part.unmasked
        sums[at] += _sum_to(powers, sums[at])
        living[at] += _sum_to(alive.double(), sums[at])
        left[at] += _sum_to(remaining.double(), sums[at])
    return (sums / living.clamp(min=1)).flatten(), left.flatten() > 0


def _powers(part: Entries, norm: int) -> tuple[Tensor, Tensor]:
    """``|w| ** norm`` in float64, 0 where masked or gone, and which entries live."""
    powers = part.magnitudes.double()
    if norm == 2:
        powers = powers.square_()
    if part.open is not None:
        powers = torch.where(part.open, powers, 0.0)
    living = part.living
    return powers, torch.ones_like(powers, dtype=torch.bool) if living is None else living


def _sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Sums over the dimensions along which ``like`` has size 1."""
    dims = [d for d in range(values.dim()) if like.shape[d] == 1 and values.shape[d] != 1]
    return values.sum(dims, keepdim=True) if dims else values


def _overlaps(axes: tuple[Tensor, ...]) -> list[list[int]]:
    """For each axis the earlier ones that share a neuron with it."""
    members = [set(a[a >= 0].tolist()) for a in axes]
    return [[j for j in range(i) if members[i] & members[j]] for i in range(len(axes))]
