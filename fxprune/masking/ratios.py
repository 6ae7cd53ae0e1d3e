"""Connections removed by ratio: groups of weights that share one, and the order they go in.

Each group is ranked once, by magnitude; a ratio is then a number of connections, and a mask one
comparison of ranks. The number removed of n is ``floor(ratio * n + 1e-9)``, ties included: among
equals the one that comes first goes first. What is masked already comes before everything else,
so a larger ratio cuts what a smaller one does and more, and nothing grows back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fxprune.analysis.neurons import ConnectionClass
from fxprune.masking.selection import removal_count

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Neurons
    from fxprune.masking.prunable import Prunable, Weight

__all__ = ["Grouping", "RatioGroup", "ratio_groups"]

Grouping = Literal["class", "layer", "one"]

CAUTION = (ConnectionClass.FEEDFORWARD, ConnectionClass.INPUT, ConnectionClass.RECURRENT)
"""From the most tolerant class to the least."""


@dataclass(frozen=True)
class RatioGroup:
    """Weights that share one ratio.

    Attributes:
        name: the class; with the layer, where layers are told apart.
        connection_class: of its weights; of the most cautious one where they are mixed.
        weights: its tensors, with the masks that were there before.
        size: connections that could be removed when nothing was.
    """

    name: str
    connection_class: ConnectionClass
    weights: tuple[Weight, ...]
    size: int

    def count(self, ratio: float) -> int:
        """How many connections a ratio removes."""
        return removal_count(ratio, self.size)

    def ranks(self, values: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The place of every connection in the order of removal.

        Args:
            values: the weights by name, as they are now.
            keep: masks by name, True where a connection is still there; absent for all.

        Returns:
            int32 of each weight's shape, on the CPU; ``size`` or more for what cannot be removed.
        """
        keys = torch.cat([_keys(w, values[w.name], keep.get(w.name)) for w in self.weights])
        order = keys.argsort(stable=True)
        ranks = torch.empty(len(keys), dtype=torch.int32)
        ranks[order] = torch.arange(len(keys), dtype=torch.int32)
        parts = ranks.split([w.tensor.numel() for w in self.weights])
        return {
            w.name: part.reshape(w.tensor.shape)
            for w, part in zip(self.weights, parts, strict=True)
        }


def ratio_groups(
    found: Prunable, classes: Sequence[str], grouping: Grouping = "class"
) -> tuple[RatioGroup, ...]:
    """Groups the weights that may be masked.

    A tensor that is used in several places (a tied one) is in one group: that of the most
    cautious of its classes (recurrent before input before feedforward), and of all layers it is
    used in together.

    Args:
        found: what may be pruned.
        classes: the classes to group, in this order.
        grouping: "class", recurrent layers together and feedforward weights by layer; "layer",
            every layer for itself (one direction of a recurrent layer is one); "one", all together.

    Returns:
        Groups of at least one connection, by class and then in execution order.
    """
    of_weight = _classes(found.neurons)
    layer_of = _layers(found.neurons)
    members: dict[str, list[Weight]] = {}
    for kind in map(ConnectionClass, classes):
        for weight in found.maskable:
            if of_weight[weight.name] is kind:
                key = _key(kind, layer_of[weight.name], grouping)
                members.setdefault(key, []).append(weight)
    groups = []
    for name, weights in members.items():
        size = sum(_open(w) for w in weights)
        if size:
            kind = max((of_weight[w.name] for w in weights), key=CAUTION.index)
            groups.append(RatioGroup(name, kind, tuple(weights), size))
    return tuple(groups)


def _key(kind: ConnectionClass, layer: str, grouping: Grouping) -> str:
    """The name of the group that a weight belongs to."""
    if grouping == "one":
        return "all"
    if grouping == "layer":
        return layer
    return f"{kind} {layer}" if kind is ConnectionClass.FEEDFORWARD else kind.value


def _keys(weight: Weight, values: Tensor, keep: Tensor | None) -> Tensor:
    """Sorting keys: magnitudes, below them what was cut since, above them what is not counted."""
    keys = values.detach().abs().cpu().to(_wide(values.dtype), copy=True)
    if keep is not None:
        keys.masked_fill_(~keep.cpu(), -1.0)
    for part in weight.entries():
        if part.open is not None:
            keys[part.rows].masked_fill_(~part.open, torch.inf)
    return keys.flatten()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _open(weight: Weight) -> int:
    return sum(
        part.magnitudes.numel() if part.open is None else int(part.open.count_nonzero())
        for part in weight.entries()
    )


def _classes(neurons: Neurons) -> dict[str, ConnectionClass]:
    """The most cautious class among the uses of each weight."""
    found: dict[str, ConnectionClass] = {}
    for block in neurons.blocks:
        for name in block.weights:
            uses = (found.get(name, CAUTION[0]), block.connection_class)
            found[name] = max(uses, key=CAUTION.index)
    return found


def _layers(neurons: Neurons) -> dict[str, str]:
    """A name for each weight's layer: weights that meet in one operation are of one layer."""
    layer: dict[str, str] = {}
    for block in neurons.blocks:
        for name in block.weights:
            layer.setdefault(name, name.removesuffix(".weight"))
    uses: dict[object, str] = {}
    for block in neurons.blocks:
        first = uses.setdefault(block.consumer, block.weight)
        for name in block.weights:
            _join(layer, first, name)
    return layer


def _join(layer: dict[str, str], one: str, other: str) -> None:
    old, new = layer[other], layer[one]
    if old == new:
        return
    for name, current in layer.items():
        if current == old:
            layer[name] = new
