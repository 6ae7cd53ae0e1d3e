"""Dynamic pruning: masks are made anew again and again, and what was pruned can come back.

With dense weights V and a mask M of 0 and 1 the model computes with

    W = V * M,      and      dL/dV = dL/dW

instead of ``dL/dW * M``: gradients go straight through, so pruned weights go on learning. Every
``every`` steps the candidates are scored on V as it is, and those that weigh least are out, exactly
floor(s_t * n + 1e-9) of n; with a ramp of length r from step t_0,

    s_t = s (1 - (1 - (t - t_0) / r)^3)

1. What the candidates are, see :mod:`fxprune.masking.structures`. Several structures in one, such
   as ``connection+filter``, each make a mask of their own; what stays is what all of them keep.
2. Structures that mask entries of weights leave biases alone. ``filter``, ``channel`` and
   ``neuron`` drop neurons: what leaves the neuron is 0, whatever its bias, so it is removed in the
   end, bias and all. Gradients reach, straight through, the weights that enter the neurons of a
   ``filter`` and those that leave the neurons of the other two; those at the other end of a dropped
   neuron get none. Nor does anything before a dropped filter: of linear maps and convolutions
   (:mod:`fxprune.masking.shielding`), and of recurrent layers, where the rows that enter a dropped
   unit are masked, so that it learns from what its biases make of it. ``depth`` drops residual
   branches by masking what they add; gradients go through that, so all of a dropped branch goes on
   learning. In the end, the weights and biases that it ends in are masked instead, and the branch
   is removed whole. Where a batch norm reads an output of which no connection is in, nothing goes
   through: of a constant it would make gradients hundreds of times too large.
3. Momentum and weight decay act on V, masked or not. V is what ``state_dict`` holds; in the end
   W takes its place.
4. After the fraction ``end`` of the steps the masks are final, and gradients are those of W: the
   rest is fine-tuning. The best epoch of that part is the result. It does not matter whether the
   model was trained before.
5. With ``hysteresis`` h, what is in counts 1 + h times: less coming and going.
6. ``regrow=False`` is the control: the same schedule, but what is out stays out and learns nothing.

Source: Hu et al., "Dynamic pruning on multiple sparse structures", IEEE Access 2023,
https://doi.org/10.1109/access.2023.3267469, of which interval, ramp and scope are not public. There
a layer adds 1e-6 to its output, or ReLU would stop gradients in dropped filters; here filters are
dropped behind the activation, where nothing needs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fxprune.contract import Facts, NeuronAnalysis, check_choice, check_count, check_number
from fxprune.errors import ConfigError, PreconditionError
from fxprune.learning import LearnedPass, Learning, Schedule
from fxprune.masking.cutting import SCOPES, require_free_neurons
from fxprune.masking.prunable import Prunable, find_prunable
from fxprune.masking.structure import Structure
from fxprune.masking.structures import NEURON_STRUCTURES, STRUCTURES, make_structure
from fxprune.passes._dynamic_masks import FollowingMasks, Regrowth
from fxprune.policy import protected

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["DynamicPruning", "Regrowth"]


@dataclass(frozen=True)
class DynamicPruning(LearnedPass):
    """Masks what weighs least at the moment, while the model trains on the task.

    Attributes:
        sparsity: the fraction to remove in the end of the candidates that compete, in [0, 1); in a
            mixture one for all structures, or one for each.
        structure: what is removed: "connection" (default), "kernel-row", "kernel-column",
            "kernel", "row", "column", "filter", "channel", "neuron" or "depth", or a mixture
            joined by "+".
        scope: what competes: "group" (default), each weight or neuron group for itself; "class",
            each connection class; "global", all; in a mixture one for all structures, or one for
            each. Residual branches always all compete.
        every: steps from one rebuilding of the masks to the next, 10 by default.
        start: when pruning starts, as a fraction of all training steps, 0 by default.
        ramp: how long sparsity grows from 0, likewise; 0 for none. 0.4 by default.
        end: when the masks become final, likewise; 0.75 by default.
        hysteresis: how much more, relatively, what is in counts than what is out; 0.1 by default.
        regrow: whether what was removed can come back; it can by default.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> str(DynamicPruning(0.9, "connection+filter", regrow=False))
        'dynamic-pruning{sparsity=0.9,structure=connection+filter,regrow=false}'
    """

    sparsity: float | tuple[float, ...]
    structure: str = "connection"
    scope: str | tuple[str, ...] = "group"
    every: int = 10
    start: float = 0.0
    ramp: float = 0.4
    end: float = 0.75
    hysteresis: float = 0.1
    regrow: bool = True

    def __post_init__(self) -> None:
        for option in ("sparsity", "scope"):
            value = getattr(self, option)
            object.__setattr__(self, option, tuple(value) if isinstance(value, list) else value)
        _check_structures(self)
        check_choice(self, "regrow", (True, False))
        for option in ("start", "ramp", "end", "hysteresis"):
            check_number(self, option, 0, math.inf)
        if not self.start + self.ramp <= self.end <= 1:
            raise ConfigError(
                f"options 'start', 'ramp' and 'end' of pass {self.name!r} must be fractions of "
                f"the training, start + ramp <= end <= 1, not {self.start!r}, {self.ramp!r} and "
                f"{self.end!r}"
            )
        check_count(self, "every")

    @property
    def structures(self) -> tuple[str, ...]:
        """The structures of the mixture."""
        return tuple(self.structure.split("+"))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsity of each structure."""
        given = self.sparsity
        return given if isinstance(given, tuple) else (given,) * len(self.structures)

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scope of each structure."""
        given = self.scope
        return given if isinstance(given, tuple) else (given,) * len(self.structures)

    def requires(self, program: Program, facts: Facts) -> None:
        """There must be something to remove.

        Raises:
            PreconditionError: neurons are to go and all are frozen, or branches, and there is none;
                or the training is of unknown length.
        """
        super().requires(program, facts)
        neurons = facts[NeuronAnalysis]
        for name, sparsity in zip(self.structures, self.sparsities, strict=True):
            if name in NEURON_STRUCTURES and sparsity > 0:
                require_free_neurons(neurons, self.name)
            if name == "depth" and sparsity > 0:
                found = self._prunable(program, facts)
                _require_branches(self._make(name, program, found, facts), self.name)

    def attach(self, program: Program, facts: Facts, steps: int) -> Learning:
        """Puts masks and gates into the model, which follow its weights."""
        found = self._prunable(program, facts)
        structures = [self._make(name, program, found, facts) for name in self.structures]
        return FollowingMasks(
            program, found, self, structures, Schedule(steps, self.start, self.end)
        )

    def _prunable(self, program: Program, facts: Facts) -> Prunable:
        neurons = facts[NeuronAnalysis]
        return find_prunable(program, neurons, protected(program, neurons, facts.context.protect))

    def _make(self, name: str, program: Program, found: Prunable, facts: Facts) -> Structure:
        protection = protected(program, found.neurons, facts.context.protect)
        scope = self.scopes[self.structures.index(name)]
        return make_structure(name, program, found, protection, scope)

    def reached(self, schedule: Schedule, step: int) -> float:
        """Which part of the sparsity is reached after so many steps, from 0 to 1."""
        length = round(self.ramp * schedule.steps)
        if step >= min(schedule.last, schedule.first + length):
            return 1.0
        return 1 - (1 - max(0, step - schedule.first) / length) ** 3


def _check_structures(given: DynamicPruning) -> None:
    named = given.structure.split("+") if isinstance(given.structure, str) else [given.structure]
    wrong = [name for name in named if name not in STRUCTURES]
    if wrong or len(set(named)) < len(named):
        raise ConfigError(
            f"option 'structure' of pass {given.name!r} must be one of {', '.join(STRUCTURES)}, or "
            f"several different ones joined by '+', not {given.structure!r}"
        )
    for option, values in (("sparsity", given.sparsities), ("scope", given.scopes)):
        if len(values) != len(named):
            raise ConfigError(
                f"option {option!r} of pass {given.name!r} has {len(values)} values for "
                f"{len(named)} structures ({given.structure}): give one for all, or one for each"
            )
    if not all(scope in SCOPES for scope in given.scopes):
        raise ConfigError(
            f"option 'scope' of pass {given.name!r} must be one of {', '.join(SCOPES)}, or one "
            f"for each structure, not {given.scope!r}"
        )
    for each in given.sparsities:
        number = isinstance(each, int | float) and not isinstance(each, bool)
        if not number or not 0 <= each < 1:
            raise ConfigError(
                f"option 'sparsity' of pass {given.name!r} must be a number in [0, 1), or one for "
                f"each structure, not {given.sparsity!r}"
            )


def _require_branches(depth: Structure, pass_name: str) -> None:
    if depth.size:
        return
    _, refusals = depth.lowest(torch.zeros(0), 0.0)
    reasons = "; ".join(f"{r.node}: {r.reason}" for r in refusals[:8])
    raise PreconditionError(
        f"no residual branch of this model may be removed ({reasons or 'it has none'}). Prune "
        "another structure.",
        pass_name=pass_name,
    )
