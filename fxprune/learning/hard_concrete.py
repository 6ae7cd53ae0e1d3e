"""Hard concrete gates: random while they are trained, 0 or 1 or between in the end.

    u ~ U(0, 1),  v = sigmoid((ln u - ln(1 - u) + a) / beta)
    gate = clip(v (zeta - gamma) + gamma, 0, 1)
    settled gate = clip(sigmoid(a) (zeta - gamma) + gamma, 0, 1)
    p(gate > 0) = sigmoid(a - beta ln(-gamma / zeta))

with beta = 2/3, gamma = -0.1 and zeta = 1.1: p(gate > 0) = sigmoid(a + 1.599), and the settled gate
is 0 up to a = -2.398 and 1 from a = 2.398. One sample is drawn per call of the model, for all its
time steps.

Source: Louizos, Welling, Kingma, "Learning sparse neural networks through L0 regularization",
https://arxiv.org/abs/1712.01312.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fxprune.learning.candidates import Candidates
from fxprune.learning.cost import Cost
from fxprune.learning.neuron_gates import NeuronGates
from fxprune.learning.variables import MaskVariables

__all__ = ["HardConcrete"]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
SHIFT = -BETA * math.log(-GAMMA / ZETA)
BOUND = math.log(100)
EPS = 1e-6


class HardConcrete(NeuronGates):
    """Gates under a penalty on the expected cost of what is there.

    Args:
        candidates: the neurons with a gate.
        cost: what the penalty is on.
        drop: the probability 1 - sigmoid(a) that the gates start with, in (0, 1).
        rate: of Adam, at which ``a`` is learned.
    """

    reopened = 0.1

    def __init__(self, candidates: Candidates, cost: Cost, *, drop: float, rate: float) -> None:
        super().__init__(candidates)
        self.cost = cost
        start = torch.full((len(candidates),), math.log((1 - drop) / drop), dtype=torch.float32)
        self.logits = MaskVariables(start, rate=rate, bound=BOUND)

    def moving(self) -> Tensor:
        """One sample of each gate; a group of which none is open opens its most probable one."""
        a = self.logits.values
        u = torch.rand(len(a), dtype=a.dtype, device=a.device).clamp(EPS, 1 - EPS)
        gates = _stretched((u.logit() + a) / BETA)
        return torch.where(self.candidates.lacking(gates > 0, a), 1.0, gates)

    def scores(self) -> Tensor:
        """How probable each gate is open."""
        return self.logits.values.detach()

    def learned(self) -> Tensor:
        """The gates without the noise."""
        return _stretched(self.logits.values.detach())

    def probabilities(self) -> Tensor:
        """That each gate is not 0, [n], differentiable."""
        return torch.sigmoid(self.logits.values + SHIFT)

    def measure(self, module: fx.GraphModule) -> Tensor:
        """The expected cost, as a fraction of what it was."""
        return self.candidates.share(self.cost, self.probabilities()).float()

    def goal(self, target: float) -> float:
        """The same: what is measured is the cost."""
        return target

    def update(self, module: fx.GraphModule) -> None:
        """One step of Adam along what ``backward`` left."""
        self.logits.update(self.logits.gradient())


def _stretched(x: Tensor) -> Tensor:
    return (torch.sigmoid(x) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
