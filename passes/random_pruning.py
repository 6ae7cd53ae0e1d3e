"""Random pruning: the baseline that any score has to beat.

    removed = floor(sparsity * n + 1e-9) of n candidates, drawn without looking at the weights

Scopes, counts, floors and refusals are those of magnitude pruning, so that the two differ in
nothing but the choice:
    1. ``connection``: single entries of weights, masked.
    2. ``neuron``: neurons, cut off; the last of a group stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fxprune.contract import (
    Effect,
    Facts,
    NeuronAnalysis,
    Pass,
    PassResult,
    check_choice,
    check_number,
)
from fxprune.errors import ConfigError
from fxprune.masking.cutting import (
    SCOPES,
    cut_connections,
    cut_neurons,
    require_free_neurons,
    scored,
)
from fxprune.masking.prunable import find_prunable
from fxprune.masking.scores import neuron_scores
from fxprune.policy import protected
from fxprune.program import Program

__all__ = ["RandomPruning"]


@dataclass(frozen=True)
class RandomPruning(Pass):
    """Removes neurons or connections drawn at random, once.

    Attributes:
        sparsity: the fraction to remove of what may be pruned, in [0, 1).
        structure: what is removed: "neuron" (default) or "connection".
        scope: among which candidates the fraction is taken: "group" (default), each neuron group,
            or each weight, for itself; "class", each connection class (for neurons: recurrent
            ones and the rest); "global", all.
        seed: of the draw, 0 by default; the same seed draws the same from the same model.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> str(RandomPruning(0.9, structure="connection", seed=3))
        'random-pruning{sparsity=0.9,structure=connection,seed=3}'
    """

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})

    sparsity: float
    structure: Literal["neuron", "connection"] = "neuron"
    scope: Literal["group", "global", "class"] = "group"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "sparsity", 0, 1)
        check_choice(self, "structure", ("neuron", "connection"))
        check_choice(self, "scope", SCOPES)
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ConfigError(
                f"option 'seed' of pass {self.name!r} must be an integer from 0 to 2**32 - 1, "
                f"not {self.seed!r}"
            )

    def requires(self, program: Program, facts: Facts) -> None:
        """Where neurons are to go, some neuron must be free to.

        Raises:
            PreconditionError: every neuron is frozen; with the reasons.
        """
        if self.structure == "neuron" and self.sparsity > 0:
            require_free_neurons(facts[NeuronAnalysis], self.name)

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Adds to the masks of the program."""
        neurons = facts[NeuronAnalysis]
        found = find_prunable(program, neurons, protected(program, neurons, facts.context.protect))
        draw = torch.Generator().manual_seed(self.seed)
        if self.structure == "neuron":
            # Which neurons can be judged at all is decided as by magnitude.
            judged = neuron_scores(found.weights, neurons.count, 1).isfinite()
            scores = torch.rand(neurons.count, generator=draw, dtype=torch.float64)
            scores = scores.where(judged, torch.inf)
            cut, refusals = cut_neurons(found, scores, self.sparsity, self.scope)
            masks = program.masks.cut_neurons(cut)
        else:
            drawn = {w.name: torch.rand(w.tensor.shape, generator=draw) for w in found.maskable}
            keep = cut_connections(scored(found.maskable, drawn), self.sparsity, self.scope)
            masks, refusals = program.masks.cut_connections(keep), found.kept_weights
        return PassResult.masking(program, masks, refusals)
