"""Magnitude pruning: what weighs least goes.

    removed = the floor(sparsity * n + 1e-9) lowest of n scores, in one step
    score   = mean of |w| ** norm over the weights of a candidate

Structures:
    1. ``connection``: single entries of weights, masked.
    2. ``row``, ``column``: of one weight as a matrix of outputs by all else (one gate's row is a
       row); masked. A convolution's column is one input channel at one place of the kernel; an
       embedding's is a row of its table, since it produces channels.
    3. ``neuron``: neurons, scored over the weights that begin or end at them, cut off.

Left alone, each with its reason: what is protected or gone; tensors of one dimension, and those
that no operation contracts with; frozen neurons (for structure ``neuron``), and rows that lead to
them (``row``); the best neuron of a group, row or column of a weight, where all would have gone.

Source: Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural
networks", https://arxiv.org/abs/1506.02626.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fxprune.contract import (
    Effect,
    Facts,
    NeuronAnalysis,
    Pass,
    PassResult,
    check_choice,
    check_count,
    check_idle,
    check_number,
)
from fxprune.masking.cutting import SCOPES, cut_connections, cut_neurons, require_free_neurons
from fxprune.masking.positions import make_positions
from fxprune.masking.prunable import find_prunable
from fxprune.masking.scores import neuron_scores
from fxprune.policy import protected

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["Magnitude"]

STRUCTURES = ("connection", "row", "column", "neuron")


@dataclass(frozen=True)
class Magnitude(Pass):
    """Removes what has the smallest magnitude, once.

    Attributes:
        sparsity: the fraction to remove of what may be pruned, in [0, 1).
        structure: what is removed: "neuron" (default), "row", "column" or "connection".
        scope: among which candidates the fraction is taken: "group" (default), each neuron group,
            or each weight, for itself; "class", each connection class (for neurons: recurrent
            ones and the rest); "global", all.
        norm: the power of the magnitudes, 1 (default) or 2. Not for connections.
        round_to: keep a multiple of so many neurons in each group, more rather than fewer, since
            kernels are fastest at multiples of 4 or 8; 1 by default. Only for neurons.

    Raises:
        ConfigError: an option is out of range, or has no effect with the others.

    Example:
        >>> str(Magnitude(0.9, structure="connection"))
        'magnitude{sparsity=0.9,structure=connection}'
    """

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})

    sparsity: float
    structure: Literal["connection", "row", "column", "neuron"] = "neuron"
    scope: Literal["group", "global", "class"] = "group"
    norm: Literal[1, 2] = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        check_number(self, "sparsity", 0, 1)
        check_choice(self, "structure", STRUCTURES)
        check_choice(self, "scope", SCOPES)
        check_choice(self, "norm", (1, 2))
        check_count(self, "round_to")
        if self.structure != "neuron":
            check_idle(self, ("round_to",), f"structure={self.structure}, which removes no neurons")
        if self.structure == "connection":
            check_idle(self, ("norm",), "structure=connection, where a score is of one weight")

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
        masks = program.masks
        if self.structure == "neuron":
            scores = neuron_scores(found.weights, neurons.count, self.norm)
            cut, refusals = cut_neurons(found, scores, self.sparsity, self.scope, self.round_to)
            masks = masks.cut_neurons(cut)
        elif self.structure == "connection":
            keep = cut_connections(found.maskable, self.sparsity, self.scope)
            masks, refusals = masks.cut_connections(keep), found.kept_weights
        else:
            positions = make_positions(self.structure, found, self.scope, self.norm)
            tensors = {w.name: w.tensor for w in found.maskable}
            goes, refusals = positions.lowest(positions.scores(tensors), self.sparsity)
            keep = positions.masks(~goes)
            whole = {n: keep[n].expand(t.shape).contiguous() for n, t in tensors.items()}
            masks = masks.cut_connections({n: m for n, m in whole.items() if not bool(m.all())})
        return PassResult.masking(program, masks, refusals)
