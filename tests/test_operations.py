"""Names and arguments of operations."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from fxprune.operations import argument, dims_of, is_mutable, operation_name
from fxprune.tracing import recurrent

aten = torch.ops.aten


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    return fx.Graph().call_function(target, args, kwargs)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.linear.default, "linear"),
        (aten.sort.stable, "sort"),
        (recurrent.lstm, "lstm"),
        (operator.getitem, "getitem"),
    ],
)
def test_names_have_no_namespace_and_no_overload(target: Any, name: str) -> None:
    assert operation_name(call(target)) == name


@pytest.mark.parametrize(
    ("node", "name", "value"),
    [
        (call(aten.cat.default, [1, 2], 3), "dim", 3),
        (call(aten.cat.default, [1, 2], dim=3), "dim", 3),
        (call(aten.cat.default, [1, 2]), "dim", 0),  # its default
        (call(aten.sort.stable, 1, stable=True), "dim", -1),  # a default after a keyword
        (call(aten.slice.Tensor, 1), "step", 1),
        (call(aten.squeeze.default, 1), "dim", None),  # has no such argument
        (call(aten.linear.default, 1, 2), "bias", None),  # was not given
        (call(recurrent.gru, *range(7)), "lengths", 6),  # a function of Python
        (call(recurrent.gru, *range(6)), "lengths", None),
    ],
)
def test_arguments_by_name(node: fx.Node, name: str, value: object) -> None:
    assert argument(node, name) == value


@pytest.mark.parametrize(
    ("given", "dims"),
    [(None, {0, 1, 2}), (-1, {2}), ([0, -1], {0, 2}), ((1,), {1}), ([], {0, 1, 2})],
)
def test_dimensions(given: Any, dims: set[int]) -> None:
    assert dims_of(given, 3) == dims


def test_what_changes_an_argument() -> None:
    assert is_mutable(call(aten.add_.Tensor, 1, 2))
    assert not is_mutable(call(aten.add.Tensor, 1, 2))
    assert not is_mutable(call(operator.getitem, 1, 2))
    assert not is_mutable(fx.Graph().placeholder("x"))
