"""Where things are while a fit runs: the module's device and mode, batches, loaders' generators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxprune.errors import ConfigError
from fxprune.training.checkpoint import tensors_of

__all__ = ["kept_modes", "loader_generators", "move", "moved", "placed"]


@contextmanager
def placed(module: nn.Module, device: str | torch.device) -> Iterator[torch.device | None]:
    """Move a module to a device and back.

    Args:
        module: moved in place.
        device: "auto" leaves it where it is.

    Yields:
        The device, None for a module that is spread over several.

    Raises:
        ConfigError: the device is not there, or the module is spread over several.
    """
    homes = {tensor.device for tensor in tensors_of(module).values()} or {torch.device("cpu")}
    home = homes.pop() if len(homes) == 1 else None
    if device == "auto":
        yield home
        return
    if home is None:
        raise ConfigError(
            f"Task.device is {str(device)!r}, but the module is spread over several devices: "
            "leave the device out to train it there"
        )
    try:
        move(module, device)
        yield torch.device(device)
    finally:
        module.to(home)


def move(module: nn.Module, device: str | torch.device) -> None:
    """Move a module to the device that a task names; "auto" leaves it where it is.

    Raises:
        ConfigError: the device is not there. The module may be half moved then.
    """
    if device == "auto":
        return
    try:
        module.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"Task.device {str(device)!r} cannot be used ({error}): "
            "name another or leave it out to train where the model is"
        ) from error


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Put every submodule back into the mode, training or evaluation, that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        if module.training != modes[0][1]:
            module.train(modes[0][1])  # a program switches its graph here
        for part, training in modes:
            part.training = training


def moved(batch: Any, device: torch.device) -> Any:
    """Move everything movable in a batch to a device, through tuples, lists and mappings."""
    if hasattr(batch, "to"):  # a tensor, a packed sequence, a tokenizer's mapping
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def loader_generators(train: object) -> tuple[torch.Generator, ...]:
    """The generators that a data loader and its samplers hold, each once."""
    sampler = getattr(train, "sampler", None)
    batch_sampler = getattr(train, "batch_sampler", None)
    owners = (train, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return tuple({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
