"""Which neurons something still reads.

A neuron is alive if it must stay, or if an operation other than a weight reads it, or if a
connection that masks keep leads from it to a living neuron. Everything else is dead, however
densely dead neurons read each other: liveness is reachability from what must stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.analysis.neurons import Block, Neurons
    from fxprune.masking.masks import Masks

__all__ = ["alive_neurons", "kept_neurons", "operand_mask"]


def alive_neurons(neurons: Neurons, masks: Masks) -> Tensor:
    """Neurons that are read under the masks, bool [count].

    Cost: one or two passes over the blocks in reverse order, more only where loops demand it.
    """
    cut = torch.zeros(neurons.count, dtype=torch.bool)
    cut[masks.neurons] = True
    alive = ~neurons.free
    for reader in neurons.readers:
        ids = reader.neurons[reader.neurons >= 0]
        alive[ids] |= ~cut[ids] if reader.kind != "other" else True
    connections = [operand_mask(block, masks.connections) for block in neurons.blocks]
    changed = True
    while changed:
        before = int(alive.sum())
        for block, mask in zip(reversed(neurons.blocks), reversed(connections), strict=True):
            _read_through(block, mask, alive, cut)
        changed = int(alive.sum()) != before
    return alive


def _read_through(block: Block, mask: Tensor | None, alive: Tensor, cut: Tensor) -> None:
    """Marks the sources of a block's connections into living neurons."""
    sources = block.sources
    if bool((sources < 0).all()):
        return
    near = (block.destinations < 0) | alive[block.destinations.clamp(min=0)]
    wanted = near if mask is None else mask & near
    repeated = [d for d in range(wanted.dim()) if sources.shape[d] == 1 and wanted.shape[d] > 1]
    if repeated:
        wanted = wanted.any(dim=repeated, keepdim=True)
    read = sources[wanted.expand(sources.shape) & (sources >= 0)]
    alive[read] |= ~cut[read]


def operand_mask(block: Block, connections: Mapping[str, Tensor]) -> Tensor | None:
    """Which connections of a block masks keep, bool of the operand's shape; None if all."""
    if block.direct:
        return connections.get(block.weight)
    touched = [n for n in _roots(block.operand) if str(n.target) in connections]
    return _evaluate(block.operand, connections) if touched else None


def _roots(node: fx.Node) -> list[fx.Node]:
    if node.op == "get_attr":
        return [node]
    return [r for n in node.all_input_nodes for r in _roots(n)]


def _evaluate(node: fx.Node, connections: Mapping[str, Tensor]) -> Tensor:
    """A rearrangement of weights, run on their masks."""
    if node.op == "get_attr":
        shape = node.meta["val"].shape
        mask = connections.get(str(node.target))
        return torch.ones(tuple(shape), dtype=torch.bool) if mask is None else mask
    values = {n: _evaluate(n, connections) for n in node.all_input_nodes}
    arguments, options = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    result: Tensor = node.target(*arguments, **options)  # type: ignore[operator]
    return result


def kept_neurons(neurons: Neurons, alive: Tensor) -> Tensor:
    """Living neurons, and one dead one wherever a tensor dimension would be left without any."""
    kept = alive.clone()
    for label in (*neurons.labels.values(), *neurons.owned.values()):
        for ids in _arrays(label):
            present = ids.reshape(-1)
            if not bool((present < 0).any()) and not bool(kept[present].any()):
                kept[present[0]] = True
    return kept


def _arrays(label: object) -> list[Tensor]:
    if isinstance(label, Tensor):
        return [label]
    return [a for part in label for a in _arrays(part)]  # type: ignore[attr-defined]
