"""Inputs that the outputs no longer follow, because too much was removed between them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.calls import Call, run_call
from fxprune.comparing import compare_outputs
from fxprune.trials import REJECTIONS, other_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.program import Program

__all__ = ["lost_inputs"]


def lost_inputs(program: Program, masked: nn.Module) -> tuple[str, ...]:
    """Names of inputs that change the outputs of a program, but not under its masks.

    Both are run at the example with other values of one tensor at a time: noise on floating
    numbers, the rest, such as tokens, backwards. What cannot be told so counts as followed.

    Args:
        program: with masks, which its own module leaves out.
        masked: the module that has them in.
    """
    if program.masks.empty:
        return ()
    leaves, structure = pytree.tree_flatten(program.example)
    calls = {
        place: pytree.tree_unflatten([*leaves[:place], varied, *leaves[place + 1 :]], structure)
        for place, varied in enumerate(map(_varied, leaves))
        if varied is not None
    }
    lost = _ignored(masked, program.example, calls)
    if lost:
        whole = program.module()
        lost -= _ignored(whole, program.example, {place: calls[place] for place in lost})
    return tuple(program.inputs[place].name for place in sorted(lost))


def _varied(leaf: Any) -> Tensor | None:
    """Other values of a tensor; None if there are none that a model must take."""
    if not isinstance(leaf, Tensor):
        return None
    if leaf.is_floating_point():
        varied: Tensor = other_values(((leaf,), {}))[0][0]
    else:
        varied = leaf.flip(tuple(range(leaf.dim())))
    return None if torch.equal(varied, leaf) else varied


def _ignored(module: nn.Module, example: Call, calls: Mapping[int, Call]) -> set[int]:
    """Which calls give what the example gives."""
    expected = run_call(module, example) if calls else None
    found = set()
    for place, call in calls.items():
        with suppress(*REJECTIONS):
            if compare_outputs(expected, run_call(module, call)).max_abs == 0:
                found.add(place)
    return found
