"""Which neurons something still reads.

A neuron is alive if it must stay, or if an operation other than a weight reads it, or if a
connection that masks keep leads from it to a living neuron. Everything else is dead, however
densely dead neurons read each other: liveness is reachability from what must stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxprune.masking.operands import operand_mask

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Block, Neurons
    from fxprune.masking.masks import Masks

__all__ = ["alive_neurons", "kept_neurons"]


def alive_neurons(neurons: Neurons, masks: Masks) -> Tensor:
    """Neurons that are read under the masks, bool [count].

    Cost: one or two passes over the blocks in reverse order, more only where loops demand it.
    """
    # One entry more stands for "no neuron", which -1 finds: always there, never cut.
    alive = np.append(~neurons.free.numpy(), True)
    cut = np.zeros(neurons.count + 1, bool)
    cut[masks.neurons.numpy()] = True
    for reader in neurons.readers:
        ids = reader.neurons.numpy()
        alive[ids] |= ~cut[ids] if reader.kind != "other" else True
    connections = [_Connections.of(block, masks) for block in reversed(neurons.blocks)]
    changed = True
    while changed:
        before = alive.sum()
        for block in connections:
            block.read(alive, cut)
        changed = alive.sum() != before
    return torch.from_numpy(alive[:-1].copy())


@dataclass(frozen=True)
class _Connections:
    """A block's neuron arrays and mask."""

    sources: NDArray[np.int64]
    destinations: NDArray[np.int64]
    mask: NDArray[np.bool_] | None

    @classmethod
    def of(cls, block: Block, masks: Masks) -> _Connections:
        mask = operand_mask(block, masks.connections)
        array = None if mask is None else mask.numpy(force=True)
        return cls(block.sources.numpy(), block.destinations.numpy(), array)

    def read(self, alive: NDArray[np.bool_], cut: NDArray[np.bool_]) -> None:
        """Marks the sources of connections into living neurons."""
        near = alive[self.destinations]
        wanted = near if self.mask is None else self.mask & near
        shape = self.sources.shape
        repeated = tuple(d for d, n in enumerate(wanted.shape) if n > 1 and shape[d] == 1)
        if repeated:
            wanted = np.any(wanted, axis=repeated, keepdims=True)
        read = self.sources[np.broadcast_to(wanted, shape)]
        alive[read] |= ~cut[read]


def kept_neurons(neurons: Neurons, alive: Tensor, masks: Masks) -> Tensor:
    """Living neurons, and one dead one wherever a tensor dimension would be left without any.

    One that is cut would bring its gate along, so another goes first.
    """
    cut = torch.isin(torch.arange(neurons.count), masks.neurons).numpy()
    kept = np.append(alive.numpy(), True)  # where -1 is, something is
    labels = (*neurons.labels.values(), *neurons.owned.values())
    arrays = {id(ids): ids for label in labels for ids in _arrays(label)}
    for ids in arrays.values():
        present = ids.numpy().ravel()
        if not kept[present].any():
            kept[present[cut[present].argmin()]] = True
    return torch.from_numpy(kept[:-1].copy())


def _arrays(label: object) -> list[Tensor]:
    if isinstance(label, Tensor):
        return [label]
    return [a for part in label for a in _arrays(part)]  # type: ignore[attr-defined]
