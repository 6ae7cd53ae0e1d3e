"""From a program with masks to the compact program that computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fxprune.masking.insertion import insert_masks
from fxprune.masking.masks import Masks
from fxprune.shrinking.fold import fold_constants
from fxprune.shrinking.liveness import alive_neurons, kept_neurons
from fxprune.shrinking.shrink import Shrunk, shrink
from fxprune.shrinking.zeros import drop_zero_terms

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Neurons
    from fxprune.program import Program

__all__ = ["compact_program"]


def compact_program(program: Program, neurons: Neurons) -> Shrunk:
    """Folds constants, removes what nothing reads, bakes the other masks into the weights.

    Args:
        program: the program with its masks.
        neurons: its analysis.

    Returns:
        The smaller program, without masks; equal to the masked one up to rounding.
    """
    program = fold_constants(program, neurons)
    alive = alive_neurons(neurons, program.masks)
    small = shrink(program, neurons, kept_neurons(neurons, alive, program.masks))
    masks = small.program.masks
    with torch.no_grad():
        for name, keep in masks.connections.items():
            small.program.tensors[name].data.mul_(keep.to(small.program.tensors[name]))
    silent = {name for name, keep in masks.connections.items() if not keep.any()}
    # Cut neurons that had to stay physically keep their gate.
    gated = replace(small.program, masks=Masks(masks.neurons))
    return replace(small, program=drop_zero_terms(insert_masks(gated, small.neurons), silent))
