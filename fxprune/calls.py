"""Calls of a model: what they are, and how one is run where results are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.randomness import preserved_random_state

__all__ = ["Call", "run_call"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of the model."""


def run_call(module: Callable[..., Any], call: Call) -> Any:
    """Runs a module on clones of a call, without gradients, always with the same random numbers."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, call)
    with preserved_random_state(0), torch.no_grad():
        return module(*args, **kwargs)
