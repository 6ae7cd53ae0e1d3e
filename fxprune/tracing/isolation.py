"""Keeping the user's module and the process as they were while a model runs or is traced."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["isolated", "preserved_random_state"]

_CONTAINERS = ("_parameters", "_buffers", "_modules")
# torch.export swaps parameters, and recurrent modules list theirs again when it does.
_IGNORED = (*_CONTAINERS, "_flat_weights")


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Restores the random states of Python, numpy and torch when the block ends.

    Args:
        seed: if given, all of them are seeded with it first.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass(frozen=True)
class _Snapshot:
    """One module's attributes, shallow copies of its containers, and its buffers' values."""

    module: nn.Module
    attributes: dict[str, Any]
    containers: dict[str, dict[str, Any]]
    versions: dict[str, int]
    values: dict[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> _Snapshot:
        buffers = {n: b for n, b in module._buffers.items() if b is not None}
        return cls(
            module,
            dict(module.__dict__),
            {name: dict(module.__dict__[name]) for name in _CONTAINERS},
            {n: b._version for n, b in buffers.items() if not b.is_inference()},
            {n: b.detach().clone() for n, b in buffers.items()},
        )

    def changed(self) -> list[str]:
        """Names of tensors that forward left on the module: state that a trace would lose."""
        now = self.module.__dict__
        names = [
            name
            for name, value in now.items()
            if name not in _IGNORED
            and value is not self.attributes.get(name)
            and _holds_tensor(value)
        ]
        for name, buffer in self.module._buffers.items():
            if buffer is not None and buffer is not self.containers["_buffers"].get(name):
                names.append(name)
        return names

    def restore(self) -> None:
        attributes = self.module.__dict__
        for name in set(attributes) - set(self.attributes):
            del attributes[name]
        attributes.update(self.attributes)
        for name in _CONTAINERS:
            attributes[name].clear()
            attributes[name].update(self.containers[name])
        for name, value in self.values.items():
            buffer = self.module._buffers[name]
            if buffer is not None and buffer._version != self.versions.get(name):
                with torch.no_grad():
                    buffer.copy_(value)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(v) for v in value)
    if isinstance(value, dict):
        return any(_holds_tensor(v) for v in value.values())
    return isinstance(value, Tensor)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Runs a block that may call or trace ``model`` and leaves no trace of it.

    Attributes, buffers, modes, hooks and the global random state are restored on any exit.

    Raises:
        TraceError: the block succeeded, but forward kept tensors on the module. What a later
            call reads from there would be missing in the traced program.
    """
    snapshots = [_Snapshot.of(m) for m in model.modules()]
    names = {id(m): n for n, m in model.named_modules()}
    with preserved_random_state():
        try:
            yield
            kept = [
                ".".join(filter(None, (names[id(s.module)], name)))
                for s in snapshots
                for name in s.changed()
            ]
        finally:
            for snapshot in snapshots:
                snapshot.restore()
    if kept:
        raise TraceError(
            f"forward keeps tensors on the module: {', '.join(sorted(kept))}. A traced program "
            "has no memory of earlier calls: pass the state in as an input and return the new one."
        )
