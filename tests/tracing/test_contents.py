"""Objects of the user's own keep no state of a call, and are put back whole."""

from __future__ import annotations

from argparse import Namespace
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.tracing.contents import Contents, holds_tensor
from tests.small import frames


class Plain:
    def __init__(self, h: Any = None) -> None:
        self.h, self.calls = h, 0


class Slots:
    __slots__ = ("__private", "h", "unset")

    def __init__(self, h: Any = None) -> None:
        self.h, self.__private = h, 1


@dataclass(frozen=True)
class Frozen:
    h: Any = None


class Named(dict[str, Any]):
    """A collection with attributes."""

    h: Any = None


class Endless:
    """Leads on to itself."""

    def __init__(self) -> None:
        self.me, self.h = self, None


def looks(value: Any) -> Any:
    slots = {n: getattr(value, n, "none") for n in getattr(value, "__slots__", ())[1:]}
    return {k: id(v) for k, v in {**getattr(value, "__dict__", {}), **slots}.items()}


@pytest.mark.parametrize(
    "make", [Plain, Slots, Frozen, Named, Endless, SimpleNamespace, Namespace, UserDict]
)
@pytest.mark.parametrize("nested", [False, True])
def test_tensors_that_come_into_an_object_are_seen_and_taken_out(make: Any, nested: bool) -> None:
    state = make()
    before = looks(state)
    contents, value = Contents(), {"a": [state]} if nested else state
    contents.add(value)
    assert not contents.changed(value)
    object.__setattr__(state, "h", Plain([torch.ones(1)]))
    assert contents.changed(value)
    contents.restore()
    assert not contents.changed(value)
    assert looks(state) == before


def test_slots_that_were_empty_are_emptied() -> None:
    state = Slots()
    contents = Contents()
    contents.add(state)
    state.unset = 3  # type: ignore[attr-defined]  # mypy knows no slot without a value
    contents.restore()
    assert not hasattr(state, "unset")


def test_what_is_no_tensor_is_put_back_in_silence() -> None:
    state = Plain()
    contents = Contents()
    contents.add(state)
    state.calls += 1
    assert not contents.changed(state)
    contents.restore()
    assert state.calls == 0


def test_values_of_tensors_in_objects() -> None:
    state = Plain((torch.zeros(2),))
    contents = Contents()
    contents.add(state)
    state.h[0].add_(1)
    assert contents.changed(state)
    contents.restore()
    assert not state.h[0].any()


@pytest.mark.parametrize("value", [nn.Linear(1, 1), Plain, torch, torch.Generator(), 3, None])
def test_modules_classes_and_libraries_are_left_alone(value: Any) -> None:
    assert not holds_tensor([value])


class Remembers(nn.Module):
    """Keeps its state in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.state = nn.Linear(3, 3), SimpleNamespace(h=None)

    def forward(self, x: Tensor) -> Tensor:
        """Adds what it computed before."""
        y: Tensor = self.linear(x)
        self.state.h = y if self.state.h is None else y + self.state.h
        return y


def test_a_model_that_keeps_state_in_an_object_is_refused_and_left_as_it_was() -> None:
    model = Remembers()
    with pytest.raises(TraceError, match=r"forward keeps tensors on the module: state\."):
        fxprune.trace(model, frames())
    assert model.state == SimpleNamespace(h=None)
