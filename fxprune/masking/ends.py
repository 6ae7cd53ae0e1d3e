"""The ends of weights: which operations read a weight, and which neurons it leads to or from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxprune.operations import operation_name

if TYPE_CHECKING:
    from fxprune.masking.prunable import Prunable, Weight

__all__ = ["seen_from", "varying", "weights_of"]


def weights_of(found: Prunable, operations: Collection[str]) -> frozenset[str]:
    """The weights that such operations read."""
    return frozenset(
        name
        for b in found.neurons.blocks
        if operation_name(b.consumer) in operations
        for name in b.weights
    )


def seen_from(structure: str, weight: Weight, found: Prunable) -> Weight:
    """The weight with the neurons that it counts for.

    Args:
        structure: "filter", those it enters; "channel", those it leaves; "neuron", both.
        weight: the weight.
        found: what may be pruned; the weight among it.
    """
    if structure == "neuron":
        return weight
    blocks = [b for b in found.neurons.blocks if weight.name in b.weights]
    if all(b.direct for b in blocks):
        ends = [b.destinations if structure == "filter" else b.sources for b in blocks]
        axes = [a for i, a in enumerate(ends) if not any(torch.equal(a, b) for b in ends[:i])]
    else:  # read rearranged: by the dimension that outputs lie along
        out = [set(varying(a)) <= set(weight.output_dims) for a in weight.axes]
        axes = [a for a, o in zip(weight.axes, out, strict=True) if o == (structure == "filter")]
    return replace(weight, axes=tuple(a for a in axes if bool((a >= 0).any())))


def varying(axis: Tensor) -> tuple[int, ...]:
    """The dimensions of a weight along which the neurons of an axis differ."""
    return tuple(d for d, size in enumerate(axis.shape) if size > 1)
