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
from fxprune.masking.gating import GATES, insert_gates, mask_module_name, masked_straight_through
from fxprune.masking.structures import NEURON_STRUCTURES, Structure
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
    """The mask of one tensor."""

    keep: Tensor
    through: Tensor

    def __init__(self, weight: Tensor, regrow: bool) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones_like(weight.detach()))
        self.register_buffer("through", torch.tensor(regrow, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return masked_straight_through(weight, self.keep, self.through)


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
        kept = [s.masks(torch.ones(s.size, dtype=torch.bool)) for s in structures]
        self.masked = tuple(dict.fromkeys(name for masks in kept for name in masks))
        cuts = any(s.name in NEURON_STRUCTURES for s in structures)
        parts: dict[str, nn.Module] = {
            mask_module_name(name): _Mask(program.tensors[name], options.regrow)
            for name in self.masked
        }
        if cuts:
            parts[GATES] = _gates(self.program, found, options.regrow)
        gated = insert_gates(
            self.program,
            found.neurons,
            gated=found.candidates if cuts else None,
            masked=self.masked,
            straight_through=True,
            values="filter" in options.structures,
        )
        self.module = gated.module(parts)
        device = next((t.device for t in self.program.tensors.values()), None)
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
        device = next((t.device for t in trained.tensors.values()), None)
        keep = {name: self._mask(name).keep.bool().to(device) for name in self.masked}
        values = {n: trained.tensors[n].detach() * k for n, k in keep.items()}
        masked = {n: k for n, k in keep.items() if k.dim() > 1 and not bool(k.all())}
        masks = self.program.masks.cut_connections(masked)
        for structure, tally in self._tallied():
            masks = masks.cut_neurons(structure.cut(tally.keep.cpu()))
        return replace(owned(trained, values), masks=masks)

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
        for part in self._parts():
            if isinstance(part, _Mask):
                part.keep.fill_(1)
        for structure, tally in self._tallied():
            keep = tally.keep.cpu()
            for name, mask in structure.masks(keep).items():
                own = self._mask(name).keep
                own *= mask.to(own)
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

    def _mask(self, name: str) -> _Mask:
        part = self.module.get_submodule(mask_module_name(name))
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


def _gates(program: Program, found: Prunable, regrow: bool) -> _Gates:
    dtype = next(t.dtype for t in program.tensors.values() if t.is_floating_point())
    device = next(iter(program.tensors.values())).device
    whole = torch.ones(found.neurons.count + 1, dtype=dtype)
    whole[program.masks.neurons] = 0
    through = torch.cat([found.candidates & regrow, torch.zeros(1, dtype=torch.bool)])
    return _Gates(whole.to(device), through.to(device))
