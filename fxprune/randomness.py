"""Random state: take it, put it back, and work from a seed without anyone noticing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["preserved_random_state", "random_state", "seed_everything", "set_random_state"]


def random_state(*generators: torch.Generator) -> dict[str, Any]:
    """Take the global random state, as plain values and tensors.

    Args:
        *generators: further generators to take with it, such as a data loader's own.

    Returns:
        What :func:`set_random_state` accepts. ``torch.load(weights_only=True)`` can read it back.
        CUDA generators are part of it once CUDA is in use; asking never initializes CUDA.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], *generators: torch.Generator) -> None:
    """Put back what :func:`random_state` took.

    Args:
        state: the state taken.
        *generators: the same generators, in the same order.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, saved in zip(generators, state["generators"], strict=True):
        generator.set_state(saved)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators.

    Args:
        seed: from 0 to 2**32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed would also leave a seed waiting for CUDA's first use, after we are gone.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def preserved_random_state(seed: int | None = None, *generators: torch.Generator) -> Iterator[None]:
    """Leave the global random state as it was, whatever happens inside.

    Covers Python's ``random``, numpy's global generator, torch on the CPU and, where CUDA is
    already in use, torch on every CUDA device.

    Args:
        seed: seeds the global generators inside the block, from 0 to 2**32 - 1; None leaves them.
        *generators: further generators to put back; they are not seeded.

    Example:
        >>> before = torch.get_rng_state()
        >>> with preserved_random_state(0):
        ...     noise = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    state = random_state(*generators)
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        set_random_state(state, *generators)
