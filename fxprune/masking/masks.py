"""Masks: which neurons and which connections a program does without."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Masks"]


@dataclass(frozen=True)
class Masks:
    """What a program is pruned of, on the CPU; empty masks prune nothing.

    Attributes:
        neurons: numbers of the neurons cut off, ascending, int64. Every connection that leaves
            one is cut.
        connections: for every pruned tensor, bool of its shape: True where a connection stays.
    """

    neurons: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    connections: Mapping[str, Tensor] = field(default_factory=dict)

    def cut_neurons(self, neurons: Tensor) -> Masks:
        """These masks with further neurons cut off."""
        return replace(self, neurons=torch.cat([self.neurons, neurons.cpu()]).unique())

    def cut_connections(self, keep: Mapping[str, Tensor]) -> Masks:
        """These masks with further connections cut; a connection stays where both keep it."""
        merged = dict(self.connections)
        for name, given in keep.items():
            mask = given.cpu()
            merged[name] = merged[name] & mask if name in merged else mask
        return replace(self, connections=merged)

    @property
    def empty(self) -> bool:
        """Whether nothing is pruned."""
        return not len(self.neurons) and all(bool(m.all()) for m in self.connections.values())

    def same_as(self, other: Masks) -> bool:
        """Whether both prune exactly the same."""
        return (
            torch.equal(self.neurons, other.neurons)
            and self.connections.keys() == other.connections.keys()
            and all(torch.equal(m, other.connections[n]) for n, m in self.connections.items())
        )
