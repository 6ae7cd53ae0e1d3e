"""What a pass may prune: the weights as it sees them, and the neurons it may remove."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxprune.analysis.labels import varying
from fxprune.analysis.neurons import INPUT, OUTPUT
from fxprune.program import Kind, Refusal

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Block, ConnectionClass, Neurons
    from fxprune.policy import Protection
    from fxprune.program import Program

__all__ = ["Entries", "Prunable", "Weight", "find_prunable"]

CHUNK = 1 << 18
"""Entries looked at together: what a pass needs beyond its masks does not grow with the model."""


@dataclass(frozen=True)
class Entries:
    """A slice of a weight along its first dimension.

    Attributes:
        rows: the slice.
        magnitudes: absolute values on the CPU, in the weight's own precision.
        living: whether both ends of each connection live; None if all do.
        unmasked: which are not masked yet; None if none is.
        axes: the neuron arrays of the weight over the slice.
    """

    rows: slice
    magnitudes: Tensor
    living: Tensor | None
    unmasked: Tensor | None
    axes: tuple[Tensor, ...]

    @property
    def open(self) -> Tensor | None:
        """Which connections there still are; None if all."""
        if self.living is None or self.unmasked is None:
            return self.unmasked if self.living is None else self.living
        return self.living & self.unmasked


@dataclass(frozen=True)
class Weight:
    """A tensor whose entries are connections; a tied one is one, however often it is used.

    Attributes:
        name: of the tensor.
        tensor: its values.
        axes: the neurons that its positions belong to, broadcastable to it; -1 for none. Both
            ends of a connection, without telling source from destination.
        connection_class: that of its first use.
        output_dims: dimensions along which its destinations lie.
        mask: connections kept so far; None for all.
        dead: bool [count], neurons whose connections are gone; None if none is.
    """

    name: str
    tensor: Tensor
    axes: tuple[Tensor, ...]
    connection_class: ConnectionClass
    output_dims: tuple[int, ...]
    mask: Tensor | None
    dead: Tensor | None

    def entries(self) -> Iterator[Entries]:
        """Goes through the weight slice by slice."""
        length = self.tensor.shape[0]
        step = max(1, CHUNK * length // max(1, self.tensor.numel()))
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            axes = tuple(a if a.shape[0] == 1 else a[rows] for a in self.axes)
            values = self.tensor.detach()[rows].abs().cpu()
            unmasked = None if self.mask is None else self.mask[rows].cpu()
            yield Entries(rows, values, self._living(axes, values), unmasked, axes)

    def _living(self, axes: tuple[Tensor, ...], values: Tensor) -> Tensor | None:
        if self.dead is None:
            return None
        living = torch.ones_like(values, dtype=torch.bool)
        for axis in axes:
            living &= ~(self.dead[axis.clamp(min=0)] & (axis >= 0))
        return living


@dataclass(frozen=True)
class Prunable:
    """What a pass may prune of a program.

    Attributes:
        neurons: the analysis.
        weights: all weights, in the order of their first use.
        maskable: those whose connections may be masked: parameters that are not protected.
        candidates: bool [count], neurons that may be removed: free, unprotected, living.
        living: bool [count], neurons that are neither cut nor unread.
        kept_neurons: why living neurons are no candidates, one entry per group concerned. That
            what enters and leaves the model stays goes without saying.
        kept_weights: why weights are not maskable.
    """

    neurons: Neurons
    weights: tuple[Weight, ...]
    maskable: tuple[Weight, ...]
    candidates: Tensor
    living: Tensor
    kept_neurons: tuple[Refusal, ...]
    kept_weights: tuple[Refusal, ...]


def find_prunable(program: Program, neurons: Neurons, protection: Protection) -> Prunable:
    """Finds what a pass may prune.

    Args:
        program: the program; what its masks cut is no longer there to prune.
        neurons: its analysis.
        protection: what the user protects.
    """
    from fxprune.shrinking.liveness import alive_neurons  # only here: shrinking imports masking

    living = alive_neurons(neurons, program.masks).clone()
    living[program.masks.neurons] = False
    weights = _weights(program, neurons, living)
    kept = _kept_weights(program, weights, protection)
    unmaskable = {refusal.node for refusal in kept}
    return Prunable(
        neurons,
        weights,
        tuple(w for w in weights if w.name not in unmaskable),
        neurons.free & ~protection.neurons & living,
        living,
        _kept_neurons(neurons, protection, living),
        kept,
    )


def _weights(program: Program, neurons: Neurons, living: Tensor) -> tuple[Weight, ...]:
    first_use: dict[str, Block] = {}
    ends = torch.zeros(neurons.count, dtype=torch.bool)
    for block in neurons.blocks:
        for name in block.weights:
            if name in program.tensors and program.tensors[name].dim() > 1:
                first_use.setdefault(name, block)
        for numbers in (block.sources, block.destinations):
            ends[numbers[numbers >= 0]] = True
    dead = ends & ~living
    return tuple(
        Weight(
            name,
            program.tensors[name],
            _end_axes(neurons.owned.get(name, ()), ends),
            block.connection_class,
            _output_dims(block),
            program.masks.connections.get(name),
            dead if bool(dead.any()) else None,
        )
        for name, block in first_use.items()
    )


def _end_axes(owned: tuple[Tensor, ...], ends: Tensor) -> tuple[Tensor, ...]:
    """Neuron arrays reduced to the ends of connections: positions in a kernel are none."""
    axes = [torch.where((a >= 0) & ends[a.clamp(min=0)], a, -1) for a in owned]
    return tuple(a for a in axes if bool((a >= 0).any()))


def _output_dims(block: Block) -> tuple[int, ...]:
    """Where the destinations lie in the weight; torch's habit, the first, where it is unknown."""
    if not block.direct:
        return (0,)
    to, out_of = varying(block.destinations), varying(block.sources)
    own = tuple(d for d in to if d not in out_of) or to
    return own or tuple(d for d in range(len(block.shape)) if d not in out_of)[:1] or (0,)


def _kept_weights(
    program: Program, weights: tuple[Weight, ...], protection: Protection
) -> tuple[Refusal, ...]:
    used = {w.name for w in weights}
    kept = []
    for name, tensor in program.tensors.items():
        parameter = program.kinds[name] is Kind.PARAMETER
        if name in protection.tensors and tensor.dim() > 1:
            kept.append(Refusal(name, "protected"))
        elif name in used and not parameter:
            kept.append(Refusal(name, "not a parameter: its values are fixed"))
        elif name not in used and parameter and tensor.dim() > 1:
            kept.append(Refusal(name, "no operation reads it as connections between neurons"))
    return tuple(kept)


def _kept_neurons(neurons: Neurons, protection: Protection, living: Tensor) -> tuple[Refusal, ...]:
    kept = []
    written = {b.destination for b in neurons.blocks}
    read = {b.source for b in neurons.blocks}
    for group in neurons.groups:
        here = living[group.neurons]
        # An input that a layer also writes to (a residual), or an output that layers read as well,
        # holds neurons back that could go otherwise.
        expected = (group.reason == INPUT and group.name not in written) or (
            group.reason == OUTPUT and group.name not in read
        )
        stay = 0 if expected else int((here & ~group.free).sum())
        guarded = int((here & group.free & protection.neurons[group.neurons]).sum())
        if stay:
            kept.append(Refusal(group.name, f"{stay} of {group.size} neurons stay: {group.reason}"))
        if guarded:
            kept.append(Refusal(group.name, f"{guarded} of {group.size} neurons stay: protected"))
    return tuple(kept)
