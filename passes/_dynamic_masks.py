"""Masks that follow the weights of a training: modules, what they remember, and rebuilding.

All of it lies in buffers of the module, so its ``state_dict`` resumes a training anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxprune.learning import Learning, Schedule
from fxprune.masking.branches import batch_normalized
from fxprune.masking.gating import GATES, insert_gates, mask_module_name, masked_straight_through
from fxprune.masking.structure import Structure
from fxprune.masking.structures import NEURON_STRUCTURES
from fxprune.training.checkpoint import tensors_of
from fxprune.weights import owned, with_weights_of

if TYPE_CHECKING:
    from fxprune.masking.prunable import Prunable
    from fxprune.passes.dynamic import DynamicPruning
    from fxprune.program import Program, Refusal

__all__ = ["FollowingMasks", "Regrowth"]

_LOG = logging.getLogger("fxprune")


@dataclass(frozen=True)
class Regrowth:
    """How much of what was removed came back.

    Attributes:
        returns: how often a candidate came back, over all rebuildings of the masks.
        survivors: how many are in now that were out before.
        removed: how many are out now.
    """

    returns: int
    survivors: int
    removed: int


class _Mask(nn.Module):
    """The mask of one tensor.

    Args:
        keep: ones in its shape.
        regrow: whether gradients go straight through.
        rows: dimensions that outputs lie along, if an output of which nothing is in is to let no
            gradient through.
    """

    keep: Tensor
    through: Tensor

    def __init__(self, keep: Tensor, regrow: bool, rows: tuple[int, ...] | None = None) -> None:
        super().__init__()
        shape = () if rows is None else [n if d in rows else 1 for d, n in enumerate(keep.shape)]
        self.regrow, self.rows = regrow, rows
        self.register_buffer("keep", keep)
        self.register_buffer("through", torch.full(shape, regrow, device=keep.device))

    def forward(self, values: Tensor) -> Tensor:
        return masked_straight_through(values, self.keep, self.through)

    def update(self, keep: Tensor) -> None:
        """Takes over which entries are in."""
        self.keep.copy_(keep)
        if self.rows is not None:
            some = self.keep.sum_to_size(self.through.shape) > 0
            self.through.copy_(some & self.regrow)


class _Gates(nn.Module):
    """Which neurons are in, and which of them let gradients through when they are out."""

    whole: Tensor
    through: Tensor

    def __init__(self, whole: Tensor, through: Tensor) -> None:
        super().__init__()
        self.register_buffer("whole", whole)
        self.register_buffer("through", through)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.whole, self.whole, self.through


class _Tally(nn.Module):
    """What one structure remembers: which candidates are in, were ever out, and came back."""

    keep: Tensor
    removed: Tensor
    returns: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(size, dtype=torch.bool))
        self.register_buffer("removed", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("returns", torch.zeros((), dtype=torch.int64))

    def note(self, keep: Tensor) -> None:
        keep = keep.to(self.keep.device)
        self.returns += (keep & ~self.keep).sum()
        self.removed |= ~keep
        self.keep.copy_(keep)


class FollowingMasks(Learning):
    """Masks that follow the weights of one training."""

    def __init__(
        self,
        program: Program,
        found: Prunable,
        options: DynamicPruning,
        structures: list[Structure],
        schedule: Schedule,
    ) -> None:
        self.program, self.options, self.schedule = owned(program), options, schedule
        self.structures = structures
        cuts = any(s.name in NEURON_STRUCTURES for s in structures)
        masks = _masks(found, structures, options.regrow)
        ends = {_branch(i): end for s in structures for i, end in enumerate(s.ends)}
        device = next((t.device for t in self.program.tensors.values()), None)
        parts: dict[str, nn.Module] = {
            **{mask_module_name(name): mask for name, mask in masks.items()},
            **{name: _Mask(torch.ones((), device=device), options.regrow) for name in ends},
        }
        if cuts:
            parts[GATES] = _gates(self.program, found, options.regrow)
        gated = insert_gates(
            self.program,
            found.neurons,
            gated=found.candidates if cuts else None,
            masked=masks,
            results=ends,
            straight_through=True,
            values="filter" in options.structures,
        )
        self.module = gated.module(parts)
        tallies = nn.ModuleList([_Tally(s.size) for s in structures]).to(device)
        self.module.add_module("_dynamic", tallies)
        self.module.register_buffer("_dynamic_step", torch.zeros((), dtype=torch.int64))
        self._update()
        self.refusals = self._kept()

    @property
    def finished(self) -> bool:
        """Whether the masks are final."""
        return self._step >= self.schedule.last

    @property
    def regrown(self) -> Mapping[str, Regrowth]:
        """What came back so far, by structure."""
        return {
            s.name: Regrowth(int(t.returns), int((t.keep & t.removed).sum()), int((~t.keep).sum()))
            for s, t in self._tallied()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Counts the step and makes the masks anew if it is time."""
        if self.finished:
            return
        self.module.get_buffer("_dynamic_step").add_(1)
        self._update()

    def harden(self) -> Program:
        """Masks as they are; what they keep of the dense weights, and 0 elsewhere."""
        for name, regrowth in self.regrown.items():
            _LOG.info("%s, %s: %s", self.options.name, name, regrowth)
        trained = with_weights_of(self.program, self.module)
        masks = self.program.masks
        for structure, tally in self._tallied():
            masks = masks.cut_neurons(structure.cut(tally.keep.cpu()))
        values: dict[str, Tensor] = {}
        for name, keep in self._kept_entries(final=True).items():
            if not bool(keep.all()):
                value = trained.tensors[name].detach()
                values[name] = value * keep.to(value)
                if value.dim() > 1:
                    whole = keep.expand(value.shape).contiguous()
                    masks = masks.cut_connections({name: whole})
        return replace(owned(trained, values), masks=masks)

    def _kept_entries(self, *, final: bool) -> dict[str, Tensor]:
        """What all structures together keep of each tensor, broadcastable to it.

        Args:
            final: whether it is for good. Then the tensors that branches end in are masked, while
                before what comes out of them is, and all that is in them goes on learning; and
                neurons are cut whole, while before rows of dropped units are masked.
        """
        kept: dict[str, Tensor] = {}
        for structure, tally in self._tallied():
            if not (structure.name in NEURON_STRUCTURES if final else structure.ends):
                for name, keep in structure.masks(tally.keep.cpu()).items():
                    kept[name] = kept[name] & keep if name in kept else keep
        return kept

    @torch.no_grad()
    def _update(self) -> None:
        step = self._step
        if self.schedule.due(step, self.options.every):
            self._rebuild(self.options.reached(self.schedule, step))
        if self.finished:
            for mask in self._parts():
                mask.get_buffer("through").zero_()

    def _rebuild(self, reached: float) -> None:
        """Scores all candidates on the dense weights and masks the lowest."""
        values = tensors_of(self.module)
        for (structure, tally), final in zip(self._tallied(), self.options.sparsities, strict=True):
            scores = self._favoured(structure.scores(values), tally.keep.cpu())
            tally.note(~structure.lowest(scores, final * reached)[0])
        self._apply()

    def _favoured(self, scores: Tensor, keep: Tensor) -> Tensor:
        """Scores that take into account what is in."""
        if self.options.regrow:
            return torch.where(keep, scores * (1 + self.options.hysteresis), scores)
        least = torch.finfo(scores.dtype).tiny  # what is out goes before an exact 0 that is in
        return torch.where(keep, scores.clamp(min=least), 0.0)

    def _apply(self) -> None:
        """What all structures keep is in."""
        for name, keep in self._kept_entries(final=False).items():
            self._part(mask_module_name(name)).update(keep)
        for structure, tally in self._tallied():
            for i in range(len(structure.ends)):
                self._part(_branch(i)).update(tally.keep[i])
        gates = self._gates()
        if gates is not None:
            cut = [s.cut(t.keep.cpu()) for s, t in self._tallied()]
            gates.whole.fill_(1)
            gates.whole[torch.cat([self.program.masks.neurons, *cut]).to(gates.whole.device)] = 0

    def _kept(self) -> tuple[Refusal, ...]:
        values = tensors_of(self.module)
        kept = (
            structure.lowest(structure.scores(values), sparsity)[1]
            for structure, sparsity in zip(self.structures, self.options.sparsities, strict=True)
        )
        return tuple(dict.fromkeys(refusal for each in kept for refusal in each))

    def _parts(self) -> list[_Mask | _Gates]:
        return [m for m in self.module.modules() if isinstance(m, _Mask | _Gates)]

    def _part(self, name: str) -> _Mask:
        part = self.module.get_submodule(name)
        assert isinstance(part, _Mask)
        return part

    def _gates(self) -> _Gates | None:
        return next((p for p in self._parts() if isinstance(p, _Gates)), None)

    def _tallied(self) -> list[tuple[Structure, _Tally]]:
        tallies: Any = self.module.get_submodule("_dynamic")
        return list(zip(self.structures, tallies, strict=True))

    @property
    def _step(self) -> int:
        return int(self.module.get_buffer("_dynamic_step"))


def _branch(number: int) -> str:
    """Name of the module that masks what a residual branch adds."""
    return f"_branch_{number}"


def _masks(found: Prunable, structures: list[Structure], regrow: bool) -> dict[str, _Mask]:
    """A module for each weight of which entries are masked."""
    everything = (s.masks(torch.ones(s.size).bool()) for s in structures if not s.ends)
    weights = {w.name: w for w in found.weights}
    normalized = batch_normalized(found.neurons)
    return {
        name: _Mask(
            torch.ones_like(weights[name].tensor.detach()),
            regrow,
            weights[name].output_dims if name in normalized else None,
        )
        for name in dict.fromkeys(name for masks in everything for name in masks)
    }


def _gates(program: Program, found: Prunable, regrow: bool) -> _Gates:
    dtype = next(t.dtype for t in program.tensors.values() if t.is_floating_point())
    device = next(iter(program.tensors.values())).device
    whole = torch.ones(found.neurons.count + 1, dtype=dtype)
    whole[program.masks.neurons] = 0
    through = torch.cat([found.candidates & regrow, torch.zeros(1, dtype=torch.bool)])
    return _Gates(whole.to(device), through.to(device))
