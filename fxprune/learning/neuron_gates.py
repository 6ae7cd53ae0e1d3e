"""Gates of neurons that are learned: what all ways of learning them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxprune.learning.candidates import Candidates
from fxprune.learning.precise import Precise

__all__ = ["NeuronGates"]


class NeuronGates(Precise, ABC):
    """A gate of each candidate; called as the module that a gated program asks for its gates.

    While they learn, the gates in train mode may differ from the settled ones, those of evaluation
    and of the result. Once they are fixed, all are the same.

    Args:
        candidates: the neurons with a gate.

    Attributes:
        fixed: whether the gates are final, a bool.
        final: what they are then, [n].
        reopened: the gate of a neuron that was closed, but that there is room for in the end.
    """

    fixed: Tensor
    final: Tensor
    reopened: ClassVar[float] = 1.0

    def __init__(self, candidates: Candidates) -> None:
        super().__init__()
        self.candidates = candidates
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.register_buffer("final", torch.ones(len(candidates), dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The scale of each neuron, and whether it is there; [count + 1] each, 1 at the end."""
        gates = self.settled() if self.fixed or not self.training else self.moving()
        there = (gates > 0).to(gates.dtype)
        whole = gates + (there - gates).detach() if gates.requires_grad else there
        end = gates.new_ones(1)
        return tuple(torch.cat([self.candidates.spread(v), end]) for v in (gates, whole))  # type: ignore[return-value]

    @abstractmethod
    def moving(self) -> Tensor:
        """The gates of one training step, [n]."""

    @abstractmethod
    def scores(self) -> Tensor:
        """How much each neuron is worth keeping, [n]."""

    @abstractmethod
    def learned(self) -> Tensor:
        """The gates as they would be now, [n], were it not that each group keeps a neuron."""

    @abstractmethod
    def measure(self, module: fx.GraphModule) -> Tensor:
        """What the penalty is of, a differentiable scalar; where dense, about 1."""

    @abstractmethod
    def goal(self, target: float) -> float:
        """The measure at which the cost is at a target."""

    @abstractmethod
    def update(self, module: fx.GraphModule) -> None:
        """Learns from a step of the optimizer."""

    def settled(self) -> Tensor:
        """The gates of evaluation, [n]: each group keeps a neuron."""
        if self.fixed:
            return self.final
        gates = self.learned()
        return torch.where(self.candidates.lacking(gates > 0, self.scores()), 1.0, gates)

    @torch.no_grad()
    def fix(self, there: Tensor | None = None) -> None:
        """Makes the gates final.

        Args:
            there: bool [n], others are closed, and those closed are opened by ``reopened``; None
                to leave them as they are.
        """
        gates = self.settled()
        if there is not None:
            gates = torch.where(there, torch.where(gates > 0, gates, self.reopened), 0.0)
        self.final.copy_(gates)
        self.fixed.fill_(True)
