"""What a structure is: candidates that are kept or dropped, scored from the weights as they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxprune.program import Refusal

if TYPE_CHECKING:
    from fxprune.masking.prunable import Weight

__all__ = ["Selected", "Structure", "Values", "at_values"]

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


def at_values(weights: Iterable[Weight], values: Values) -> list[Weight]:
    """The weights, of which those values are taken in place of the program's."""
    return [replace(w, tensor=values[w.name]) for w in weights]
