"""Cutting by score: what competes with what, how many go, and what must stay, for any method.

    removed = the floor(sparsity * n + 1e-9) lowest of the n scores that compete

Scopes: ``group``, each neuron group or weight for itself; ``class``, each connection class (for
neurons: recurrent ones and the rest); ``global``, all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxprune.errors import PreconditionError
from fxprune.masking.selection import floor_refusals, select_connections, select_lowest
from fxprune.program import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.analysis.neurons import Neurons
    from fxprune.masking.prunable import Prunable, Weight

__all__ = ["SCOPES", "cut_connections", "cut_neurons", "require_free_neurons", "scored"]

SCOPES = ("group", "global", "class")


def scored(weights: Sequence[Weight], scores: Mapping[str, Tensor]) -> tuple[Weight, ...]:
    """Weights with a score of each connection, at least 0, in place of their values."""
    return tuple(replace(w, tensor=scores[w.name]) for w in weights)


def cut_connections(weights: Sequence[Weight], sparsity: float, scope: str) -> dict[str, Tensor]:
    """Chooses the connections with the lowest scores.

    Args:
        weights: their tensors are the scores; see :func:`scored`.
        sparsity: the fraction to remove of what is left of those that compete.
        scope: see the module.

    Returns:
        For each weight that loses connections, which stay: bool of its shape.
    """
    rivals: dict[str, list[Weight]] = {}
    for weight in weights:
        key = {"group": weight.name, "class": str(weight.connection_class)}.get(scope, "")
        rivals.setdefault(key, []).append(weight)
    keep: dict[str, Tensor] = {}
    for together in rivals.values():
        keep |= select_connections(together, sparsity)
    return keep


def cut_neurons(
    found: Prunable, scores: Tensor, sparsity: float, scope: str, round_to: int = 1
) -> tuple[Tensor, tuple[Refusal, ...]]:
    """Chooses the neurons with the lowest scores; one of each group stays.

    Args:
        found: what may be pruned.
        scores: float64 [count]; neurons whose score is not finite stay.
        sparsity: the fraction to remove of the candidates that compete.
        scope: see the module.
        round_to: each group keeps a multiple of so many, where it has them: its best ones that
            would have gone stay.

    Returns:
        The numbers of the neurons that go, and why others stay.
    """
    groups = found.neurons.groups
    group_of = found.neurons.group_of()
    able = found.candidates & (group_of >= 0) & scores.isfinite()
    candidates = able.nonzero().flatten()
    group = group_of[candidates]
    recurrent = torch.tensor([g.recurrent for g in groups], dtype=torch.int64)
    rivals = {"group": group, "class": recurrent[group]}.get(scope, torch.zeros_like(group))
    # A group in which some neuron stays anyway needs no floor.
    staying = found.living & ~able
    floor = torch.tensor([not bool(staying[g.neurons].any()) for g in groups], dtype=torch.bool)
    goes, floored = select_lowest(scores[candidates], rivals, group, floor, sparsity)
    unscored = found.candidates & ~able
    reasons = [
        Refusal(g.name, "some neurons have no finite weights to be judged by")
        for g in groups
        if bool(unscored[g.neurons].any())
    ]
    reasons += floor_refusals([g.name for g in groups], floored)
    cut = candidates[goes]
    if round_to > 1:
        cut = _rounded(cut, found, scores, round_to)
    return cut, (*found.kept_neurons, *reasons)


def _rounded(cut: Tensor, found: Prunable, scores: Tensor, round_to: int) -> Tensor:
    """Fewer of the neurons that go, so that every group keeps a multiple or all it has."""
    goes = torch.zeros(found.neurons.count, dtype=torch.bool)
    goes[cut] = True
    for group in found.neurons.groups:
        own = group.neurons
        kept = int((found.living[own] & ~goes[own]).sum())
        going = own[goes[own]]
        back = going[scores[going].argsort(stable=True, descending=True)][: -kept % round_to]
        goes[back] = False
    return goes.nonzero().flatten()


def require_free_neurons(neurons: Neurons, pass_name: str) -> None:
    """Refuses a model of which no neuron may go.

    Raises:
        PreconditionError: every neuron is frozen; with the reasons.
    """
    if bool(neurons.free.any()):
        return
    reasons = "; ".join(f"{g.name}: {g.reason}" for g in neurons.groups[:8])
    raise PreconditionError(
        f"no neuron of this model may be removed ({reasons or 'it has none'}). Prune "
        "connections instead, or give the model a hidden layer.",
        pass_name=pass_name,
    )
