"""Selection: which of several candidates go, exactly and the same every time.

The number removed of n is ``floor(sparsity * n + 1e-9)``. The lowest go first; among equals the
one that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxprune.program import Refusal

if TYPE_CHECKING:
    from fxprune.masking.prunable import Weight

__all__ = ["floor_refusals", "removal_count", "select_connections", "select_lowest"]


def removal_count(sparsity: float, n: int) -> int:
    """How many of ``n`` go."""
    return math.floor(sparsity * n + 1e-9)


def select_lowest(
    scores: Tensor, scope: Tensor, group: Tensor, floor: Tensor, sparsity: float
) -> tuple[Tensor, Tensor]:
    """Selects the lowest scores of each scope, but never all of a group.

    The highest of each group with a floor is put aside first, so a scope loses as many as asked
    for as long as others are there to go.

    Args:
        scores: float64 [n].
        scope: which candidates compete with each other, int64 [n], from 0.
        group: to which group each belongs, int64 [n], from 0.
        floor: which groups must keep one of these candidates, bool [groups].
        sparsity: the fraction of each scope to remove.

    Returns:
        Which go, bool [n]; and which groups kept one that would have gone, bool [groups].
    """
    order = scores.argsort(stable=True)
    aside = torch.zeros(len(scores), dtype=torch.bool)
    members = torch.bincount(group, minlength=len(floor))
    last = members.cumsum(0)[floor & (members > 0)] - 1
    aside[order[group[order].argsort(stable=True)][last]] = True

    order = order[scope[order].argsort(stable=True)]  # scope by scope, ascending in each
    sizes = torch.bincount(scope)
    asked = (sparsity * sizes.double() + 1e-9).floor().long()[scope[order]]
    begin = (sizes.cumsum(0) - sizes)[scope[order]]
    lowest = torch.arange(len(order)) - begin < asked
    able = (~aside[order]).long()
    before = able.cumsum(0) - able
    goes = (able > 0) & (before - before[begin] < asked)

    removed = torch.zeros_like(aside)
    removed[order[goes]] = True
    floored = torch.zeros_like(floor)
    floored[group[order[lowest & (able == 0)]]] = True
    return removed, floored


def select_connections(weights: Sequence[Weight], sparsity: float) -> dict[str, Tensor]:
    """Selects the smallest connections of several weights together.

    The threshold is found on the bits of the magnitudes, sixteen at a time: exact for any number
    of entries, without sorting or copying them.

    Args:
        weights: those that compete with each other.
        sparsity: the fraction of their remaining connections to remove.

    Returns:
        For each weight that loses connections, which stay: bool of its shape, on its device.
    """
    goes = removal_count(sparsity, sum(len(bits) for bits in _all_bits(weights, torch.float64)))
    if goes == 0:
        return {}
    precision = _precision(weights)
    threshold, equal = _find_bits(
        lambda: _all_bits(weights, precision), goes, precision.itemsize * 8
    )
    keep = {}
    for weight in weights:
        mask = torch.ones(weight.tensor.shape, dtype=torch.bool, device=weight.tensor.device)
        for part in weight.entries():
            bits = _bits(part.magnitudes, precision)
            at, below = bits == threshold, bits < threshold
            if part.open is not None:
                at, below = at & part.open, below & part.open
            ties = at.flatten().cumsum(0).reshape(at.shape)
            mask[part.rows] = ~(below | (at & (ties <= equal))).to(mask.device)
            equal -= min(equal, int(at.sum()))
        if not bool(mask.all()):
            keep[weight.name] = mask
    return keep


def _precision(weights: Sequence[Weight]) -> torch.dtype:
    """The precision that holds all values exactly: float32, or float64 where some weight is."""
    wide = any(w.tensor.dtype == torch.float64 for w in weights)
    return torch.float64 if wide else torch.float32


def _bits(magnitudes: Tensor, precision: torch.dtype) -> Tensor:
    """The bits as integers, which for values of one sign order like the values."""
    return magnitudes.to(precision).view(torch.int64 if precision.itemsize == 8 else torch.int32)


def _all_bits(weights: Sequence[Weight], precision: torch.dtype) -> Iterator[Tensor]:
    for weight in weights:
        for part in weight.entries():
            bits = _bits(part.magnitudes, precision)
            yield bits.flatten() if part.open is None else bits[part.open]


def _find_bits(stream: Callable[[], Iterator[Tensor]], rank: int, width: int) -> tuple[int, int]:
    """Finds the ``rank``-th smallest (from 1), and which of those equal to it that is (from 1)."""
    found = 0
    for shift in range(width - 16, -1, -16):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for bits in stream():
            same = bits if shift + 16 == width else bits[bits >> (shift + 16) == found]
            histogram += torch.bincount(same >> shift & 0xFFFF, minlength=1 << 16)
        up_to = histogram.cumsum(0)
        digit = int(torch.searchsorted(up_to, rank))
        rank -= int(up_to[digit] - histogram[digit])
        found = found << 16 | digit
    return found, rank


def floor_refusals(names: Sequence[str], floored: Tensor) -> tuple[Refusal, ...]:
    """Says of the floored groups, in the order of their names, that one candidate stays."""
    reason = "kept its best one, though it was among the lowest: none may go empty"
    return tuple(Refusal(names[i], reason) for i in floored.nonzero().flatten().tolist())
