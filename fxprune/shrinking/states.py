"""Recurrent states that keep their external size while the units inside are fewer."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["enter_state", "leave_state"]


def enter_state(state: Tensor, units: Tensor) -> Tensor:
    """The kept units of a state on its way in.

    Args:
        state: [..., external size].
        units: kept positions, [units].
    """
    return state.index_select(-1, units)


def leave_state(state: Tensor, places: Tensor) -> Tensor:
    """A state on its way out: each unit at its old position, zeros where units are gone.

    Args:
        state: [..., units].
        places: for every external position the unit to put there, or ``units`` for a zero.

    Example:
        >>> leave_state(torch.tensor([[5.0, 6.0]]), torch.tensor([0, 2, 1]))
        tensor([[5., 0., 6.]])
    """
    return functional.pad(state, (0, 1)).index_select(-1, places)
