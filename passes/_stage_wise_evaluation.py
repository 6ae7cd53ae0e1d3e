"""Evaluating candidates of stage-wise pruning: one buffer per worker, written in place.

A buffer is a module whose weights are overwritten by each candidate's masked ones and then read
by all batches of a validation. Threads share what candidates are made from and get a buffer each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxprune.training import Task, evaluate

if TYPE_CHECKING:
    from fxprune.masking.ratios import RatioGroup

__all__ = ["Counts", "Local", "Material", "Pool", "judge"]

Counts = tuple[int, ...]
"""How many connections each group loses."""


@dataclass(frozen=True, eq=False)
class Material:
    """What the candidates of one round are made from.

    Attributes:
        values: every parameter and buffer, by name.
        ranks: the order of removal of the weights of all groups, by name.
        groups: names of the weights of each group.
    """

    values: Mapping[str, Tensor]
    ranks: Mapping[str, Tensor]
    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls,
        values: Mapping[str, Tensor],
        groups: Sequence[RatioGroup],
        keep: Mapping[str, Tensor],
    ) -> Material:
        """Of groups of weights, some of whose connections may be cut already."""
        ranks: dict[str, Tensor] = {}
        for group in groups:
            ranks |= group.ranks(values, keep)
        return cls(values, ranks, tuple(tuple(w.name for w in g.weights) for g in groups))

    def keep(self, counts: Counts) -> dict[str, Tensor]:
        """The masks of a candidate; True where a connection stays."""
        return {
            name: self.ranks[name] >= count
            for names, count in zip(self.groups, counts, strict=True)
            for name in names
        }

    def save(self, path: Path) -> None:
        """Writes it to a file for other processes."""
        values = {n: v.detach().cpu() for n, v in self.values.items()}
        groups = [list(names) for names in self.groups]
        torch.save({"values": values, "ranks": dict(self.ranks), "groups": groups}, path)

    @classmethod
    def load(cls, path: str) -> Material:
        """Reads it back."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        return cls(content["values"], content["ranks"], tuple(map(tuple, content["groups"])))


def judge(module: nn.Module, task: Task) -> float:
    """The metric of a candidate; NaN, too, is an answer: it is not within any tolerance."""
    return evaluate(module, task, where="validation of a candidate", allow_nan=True)


class _Buffer:
    """A module that holds one candidate at a time."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._material: Material | None = None
        self._counts: list[int | None] = []

    @torch.no_grad()
    def write(self, material: Material, counts: Counts) -> None:
        """Makes the module that candidate; groups that are as they were are not written."""
        if material is not self._material:
            for name, tensor in _tensors(self.module):
                if name in material.values:
                    tensor.copy_(material.values[name])
            self._material, self._counts = material, [0] * len(counts)
        for index, (names, count) in enumerate(zip(material.groups, counts, strict=True)):
            if self._counts[index] != count:
                self._counts[index] = None  # until all of it is written
                for name in names:
                    weight = self.module.get_parameter(name)
                    cut = (material.ranks[name] < count).to(weight.device)
                    weight.copy_(material.values[name]).masked_fill_(cut, 0)
                self._counts[index] = count


class Pool:
    """Buffers that are not in use; as many come to be as are used at once."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make
        self._free: list[_Buffer] = []
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[_Buffer]:
        """Lends one for the duration of the block."""
        with self._lock:
            buffer = self._free.pop() if self._free else _Buffer(self._make())
        try:
            yield buffer
        finally:
            with self._lock:
                self._free.append(buffer)


class Local:
    """Computes the metric of a candidate in this process; may be called from several threads.

    Args:
        make: makes a module with tensors of its own; called once for each buffer.
        task: says how to judge it.

    Attributes:
        material: what candidates are made from; to be set before the first call, and replaced
            when a round is over.
    """

    material: Material

    def __init__(self, make: Callable[[], nn.Module], task: Task) -> None:
        self._pool, self._task = Pool(make), task

    def __call__(self, counts: Counts) -> float:
        with self._pool.take() as buffer:
            buffer.write(self.material, counts)
            return judge(buffer.module, self._task)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
