"""Neuron arrays over tensors, and the bookkeeping of which neurons are one.

A value's label is a tuple of *axes*. Each axis is an int64 tensor with as many dimensions as the
value, of size 1 wherever it does not vary: the feature axis of ``[batch, time, 128]`` is stored as
``[1, 1, 128]``. An element of the value belongs to one neuron per axis and is removed with any of
them. Activations mostly have one axis; a weight has two, its rows and its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

__all__ = ["Axis", "Ledger", "collapse", "combine", "expand", "varying"]


@dataclass(frozen=True)
class Axis:
    """One neuron array, and the dimension of the weight it came from, if it is still one.

    Attributes:
        ids: broadcastable to the value; -1 where there is no neuron.
        role: dimension of the weight parameter this axis describes, or None for activations.
    """

    ids: Tensor
    role: int | None = None

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The dimensions along which the neuron changes."""
        return varying(self.ids)

    def overlaps(self, other: Axis) -> bool:
        """Whether both change along some dimension."""
        return bool(set(self.dims) & set(other.dims))

    def at(self, ids: Tensor) -> Axis:
        """The same axis over another value."""
        return Axis(ids, self.role)


def varying(ids: Tensor) -> tuple[int, ...]:
    """Dimensions of more than one position."""
    return tuple(d for d, size in enumerate(ids.shape) if size > 1)


def collapse(ids: Tensor) -> Tensor:
    """Drops repetition: every dimension along which all slices are equal becomes 1."""
    array = ids.numpy()
    for d, size in enumerate(array.shape):
        if size > 1:
            first = array[(slice(None),) * d + (slice(0, 1),)]
            if array.strides[d] == 0 or (array == first).all():
                array = first
    same = array.ndim == ids.dim() and array.shape == tuple(ids.shape)
    return ids.contiguous() if same else torch.from_numpy(array.copy())


def expand(axis: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A neuron array at the full size of its value, without copying."""
    return axis.expand(shape)


@dataclass
class Ledger:
    """Neurons handed out so far, which of them are one, and which must stay."""

    count: int = 0
    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)

    def fresh(self, *shape: int) -> Tensor:
        """New neurons, one per position."""
        first = self.count
        self.count += math.prod(shape)
        return torch.from_numpy(np.arange(first, self.count, dtype=np.int64).reshape(shape))

    def unify(self, a: Tensor, b: Tensor) -> None:
        """Declares neurons one, position by position with broadcasting; -1 matches nothing."""
        if a is b:
            return
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        self.left.append(a.reshape(-1))
        self.right.append(b.reshape(-1))

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Declares that neurons must stay, and why."""
        ids = ids.reshape(-1)
        ids = ids[ids >= 0]
        if ids.numel():
            self.frozen.append((ids, reason))

    def resolve(self) -> Tensor:
        """The neuron each number stands for: connected components, numbered by first mention."""
        if not self.left:
            return torch.arange(self.count, dtype=torch.int64)
        left, right = self._pairs()
        edges = coo_matrix((np.ones(len(left), bool), (left, right)), (self.count, self.count))
        _, component = connected_components(edges, directed=False)
        _, first = np.unique(component, return_index=True)
        return torch.from_numpy(first[component].astype(np.int64))

    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The different neurons declared one; those that met no neuron are frozen instead."""
        left, right = torch.cat(self.left).numpy(), torch.cat(self.right).numpy()
        different, known = left != right, (left >= 0) & (right >= 0)
        # A neuron that meets a position without one cannot go alone.
        lonely = np.maximum(left, right)[different & ~known]
        self.freeze(torch.from_numpy(lonely), _LONELY)
        left, right = left[different & known], right[different & known]
        self.left, self.right = [torch.from_numpy(left)], [torch.from_numpy(right)]
        return left, right


def combine(ledger: Ledger, left: Iterable[Axis], right: Iterable[Axis]) -> list[Axis]:
    """The left axes, and the right ones one by one: what overlaps is one, the wider stands."""
    result = list(left)
    for axis in right:
        partner = next((a for a in result if a.overlaps(axis)), None)
        if partner is None:
            result.append(axis)
            continue
        ledger.unify(partner.ids, axis.ids)
        if len(axis.dims) > len(partner.dims):
            result[result.index(partner)] = axis
    return result


_LONELY = "meets a position that belongs to no neuron"
