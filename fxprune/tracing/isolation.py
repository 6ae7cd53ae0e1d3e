"""Keeping the user's module and the process as they were while a model runs or is traced."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxprune.errors import TraceError
from fxprune.randomness import preserved_random_state
from fxprune.tracing.contents import Contents, equal_values, holds_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Isolation", "constant_parameters", "isolated"]

_CONTAINERS = ("_parameters", "_buffers", "_modules")
# torch.export swaps parameters, and recurrent modules list theirs again when it does.
_IGNORED = (*_CONTAINERS, "_flat_weights")


@dataclass(frozen=True)
class _Snapshot:
    """One module's attributes, shallow copies of its containers, and its buffers' values."""

    name: str
    module: nn.Module
    attributes: dict[str, Any]
    containers: dict[str, dict[str, Any]]
    contents: Contents

    @classmethod
    def of(cls, name: str, module: nn.Module, contents: Contents) -> _Snapshot:
        attributes = dict(module.__dict__)
        containers = {c: dict(attributes[c]) for c in _CONTAINERS}
        for key, value in (*attributes.items(), *containers["_buffers"].items()):
            if key not in _IGNORED:
                contents.add(value)
        return cls(name, module, attributes, containers, contents)

    def changed(self) -> list[str]:
        """Names of tensors that forward left on the module: state that a trace would lose."""
        now = {k: v for k, v in self.module.__dict__.items() if k not in _IGNORED}
        new = self.module._parameters.keys() - self.containers["_parameters"].keys()
        before = {**self.attributes, **self.containers["_buffers"]}
        computed = _computed_weights(self.module)
        return [
            f"{self.name}.{key}" if self.name else key
            for key, value in {**now, **self.module._buffers, **dict.fromkeys(new)}.items()
            if key in new
            or (value is not before.get(key) and holds_tensor(value) and key not in computed)
            or self.contents.changed(value)
        ]

    def restore(self) -> None:
        attributes = self.module.__dict__
        for name in set(attributes) - set(self.attributes):
            del attributes[name]
        attributes.update(self.attributes)
        for name in _CONTAINERS:
            attributes[name].clear()
            attributes[name].update(self.containers[name])


def _computed_weights(module: nn.Module) -> set[str]:
    """Weights that torch's hooks (weight norm, spectral norm, pruning) compute before forward."""
    hooks = module._forward_pre_hooks.values()
    ours = [h for h in hooks if type(h).__module__.startswith("torch.nn.utils.")]
    return {str(getattr(h, "name", getattr(h, "_tensor_name", ""))) for h in ours}


@dataclass(frozen=True)
class Isolation:
    """A model as it was when its isolation began."""

    snapshots: tuple[_Snapshot, ...]
    contents: Contents

    def check(self) -> None:
        """Refuses a model whose forward has left something behind.

        Raises:
            TraceError: forward kept tensors on the module. What a later call reads from there
                would be missing in the traced program.
        """
        kept = sorted({name for s in self.snapshots for name in s.changed()})
        if kept:
            raise TraceError(
                f"forward keeps tensors on the module: {', '.join(kept)}. A traced program has no "
                "memory of earlier calls: pass the state in as an input and return the new one."
            )

    def restore(self) -> None:
        """Puts everything back."""
        for snapshot in self.snapshots:
            snapshot.restore()
        self.contents.restore()


@contextmanager
def isolated(model: nn.Module) -> Iterator[Isolation]:
    """Runs a block that may call or trace ``model`` and leaves no trace of it.

    Attributes, buffers, modes, hooks and the global random state are restored on any exit.

    Raises:
        TraceError: the block succeeded, but forward kept tensors on the module.
    """
    contents = Contents()
    snapshots = tuple(_Snapshot.of(n, m, contents) for n, m in model.named_modules())
    isolation = Isolation(snapshots, contents)
    with preserved_random_state():
        try:
            yield isolation
            isolation.check()
        finally:
            isolation.restore()


@contextmanager
def constant_parameters(model: nn.Module) -> Iterator[None]:
    """Runs a block after which every parameter is as it was; copies only what is written to.

    Raises:
        TraceError: the block succeeded, but forward changed a parameter.
    """
    # Inference tensors cannot be changed outside inference mode anyway.
    names = {p: n for n, p in model.named_parameters() if not p.is_inference()}
    values = {p: p.data for p in names}
    originals = _Originals(values.values())
    try:
        with originals:
            yield
        changed = [names[p] for p, v in values.items() if not equal_values(p.data, originals.of(v))]
    finally:
        for parameter, value in values.items():
            parameter.data = value
        originals.restore()
    if changed:
        raise TraceError(
            f"forward changes its parameters: {', '.join(changed)}. A traced program computes from "
            "them only: do it once before compiling, or on a copy inside forward."
        )


class _Originals(TorchDispatchMode):
    """Copies the values of tensors just before an operation first writes to them."""

    supports_higher_order_operators = True  # those write to nothing, and are refused later, by name

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sharing: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.layout is torch.strided:
                self._sharing.setdefault(_storage(tensor), []).append(tensor)
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        schema = getattr(func, "_schema", None)
        for index, argument in enumerate(() if schema is None else schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else named.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self._keep(tensor)
        return func(*args, **named)

    def _keep(self, written: Any) -> None:
        if isinstance(written, Tensor) and written.layout is torch.strided:
            for tensor in self._sharing.pop(_storage(written), ()):
                self._copies[id(tensor)] = tensor, tensor.clone()

    def of(self, tensor: Tensor) -> Tensor:
        """The values that a tensor had."""
        return self._copies.get(id(tensor), (tensor, tensor))[1]

    def restore(self) -> None:
        """Puts the values back."""
        with torch.no_grad():
            for tensor, original in self._copies.values():
                tensor.copy_(original)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
