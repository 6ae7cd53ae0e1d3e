"""What hangs on the attributes of a module, to be compared and put back after a call."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import UserDict, UserList, deque
from dataclasses import dataclass
from types import MemberDescriptorType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Contents", "equal_values", "holds_tensor"]

_COLLECTIONS = (list, dict, set, deque)
_PLAIN = (SimpleNamespace, Namespace, UserDict, UserList)
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}


class Contents:
    """The collections, objects and tensors that values are or hold, however deeply nested."""

    def __init__(self) -> None:
        self._holders: dict[int, tuple[Any, _Holding]] = {}
        self._tensors: dict[int, tuple[Tensor, int | None, Tensor]] = {}

    def add(self, value: Any) -> None:
        """Remembers a value and all that it holds."""
        for part in _reachable(value):
            if not isinstance(part, Tensor):
                self._holders.setdefault(id(part), (part, _Holding.of(part)))
            elif not isinstance(part, nn.Parameter) and not part.is_meta:
                if id(part) not in self._tensors:
                    self._tensors[id(part)] = (part, _version(part), part.detach().clone())

    def changed(self, value: Any) -> bool:
        """Whether a tensor has come into a collection or object, or has other values."""
        return any(self._changed(part) for part in _reachable(value))

    def _changed(self, part: Any) -> bool:
        if id(part) in self._tensors:
            tensor, version, old = self._tensors[id(part)]
            return version != _version(tensor) and not equal_values(tensor, old)
        if id(part) not in self._holders:
            return False
        known = {id(v) for v in self._holders[id(part)][1].parts()}
        return any(id(v) not in known and holds_tensor(v) for v in _Holding.of(part).parts())

    def restore(self) -> None:
        """Puts back what is other than it was."""
        for holder, held in self._holders.values():
            if _Holding.of(holder).marks() != held.marks():
                held.restore(holder)
        for tensor, version, old in self._tensors.values():
            if version is None or _version(tensor) != version:
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(old)


@dataclass(frozen=True)
class _Holding:
    """What a collection or an object holds: its items, its attributes and its slots."""

    items: Any
    attributes: dict[str, Any]
    slots: dict[str, Any]

    @classmethod
    def of(cls, holder: Any) -> _Holding:
        items = holder.copy() if isinstance(holder, _COLLECTIONS) else ()
        if isinstance(holder, tuple):
            items = holder
        own = _is_own(holder)
        attributes = dict(getattr(holder, "__dict__", {})) if own else {}
        return cls(items, attributes, _slots(holder) if own else {})

    def parts(self) -> list[Any]:
        items = self.items.values() if isinstance(self.items, dict) else self.items
        return [*items, *self.attributes.values(), *self.slots.values()]

    def marks(self) -> list[int]:
        """Equal for as long as the same things stand in the same places."""
        names = [*self.items, *self.attributes, *self.slots]
        return [id(part) for part in (*names, *self.parts())]

    def restore(self, holder: Any) -> None:
        if isinstance(holder, list):
            holder[:] = self.items
        elif isinstance(holder, deque):
            holder.clear()
            holder.extend(self.items)
        elif isinstance(holder, (dict, set)):
            holder.clear()
            holder.update(self.items)
        if not _is_own(holder):
            return
        # Past what a class makes of setting attributes: it may be frozen.
        if hasattr(holder, "__dict__"):
            holder.__dict__.clear()
            holder.__dict__.update(self.attributes)
        for name in _slots(holder).keys() - self.slots.keys():
            object.__delattr__(holder, name)
        for name, value in self.slots.items():
            object.__setattr__(holder, name, value)


def _reachable(value: Any) -> Iterator[Any]:
    """The tensors, collections and objects that a value is or holds, each once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (tuple, *_COLLECTIONS)) or _is_own(part):
            yield part
            waiting += _Holding.of(part).parts()


def _is_own(value: Any) -> bool:
    """Whether a value is an object in which a model's author may keep state of a call.

    Modules are looked at by themselves; objects of libraries lead on to half the process.
    """
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)):
        return False
    return isinstance(value, _PLAIN) or type(value).__module__.split(".")[0] not in _LIBRARIES


def _slots(value: Any) -> dict[str, Any]:
    names = [
        name
        for kind in type(value).__mro__
        if "__slots__" in vars(kind)
        for name, member in vars(kind).items()
        if isinstance(member, MemberDescriptorType)
    ]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def equal_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same in shape, type and values."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach(), b)


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or one can be reached from it."""
    return any(isinstance(part, Tensor) for part in _reachable(value))
