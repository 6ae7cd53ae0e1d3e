"""Recurrent states that keep their external size while the units inside are fewer.

Like the recurrent layers these stay one node each in an archive, so that a compact program that is
loaded again still shows which of its inputs and outputs are states.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fxprune.tracing.recurrent import traces_markers

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["enter_state", "leave_state", "plain_states"]

_PLAIN: ContextVar[bool] = ContextVar("fxprune_plain_states", default=False)


@contextmanager
def plain_states() -> Iterator[None]:
    """While active, ``torch.export`` sees the indexing that these operations are made of."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def _kept_whole() -> bool:
    return traces_markers() and not _PLAIN.get()


def enter_state(state: Tensor, units: Tensor) -> Tensor:
    """The kept units of a state on its way in.

    Args:
        state: [..., external size].
        units: kept positions, [units].
    """
    if _kept_whole():
        result: Tensor = torch.ops.fxprune.enter_state(state, units)
        return result
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
    if _kept_whole():
        result: Tensor = torch.ops.fxprune.leave_state(state, places)
        return result
    return functional.pad(state, (0, 1)).index_select(-1, places)


@torch.library.custom_op("fxprune::enter_state", mutates_args=())
def _enter_marker(state: Tensor, units: Tensor) -> Tensor:
    return enter_state(state, units)


@torch.library.custom_op("fxprune::leave_state", mutates_args=())
def _leave_marker(state: Tensor, places: Tensor) -> Tensor:
    return leave_state(state, places)


def _fake(state: Tensor, index: Tensor) -> Tensor:
    return state.new_empty(*state.shape[:-1], index.shape[0])


_enter_marker.register_fake(_fake)
_leave_marker.register_fake(_fake)
