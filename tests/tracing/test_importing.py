"""Exported programs become programs: pure, named, without what only torch.export needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError, UnsupportedOpError
from fxprune.program import Kind, Program
from fxprune.tracing import packing, recurrent
from fxprune.tracing.exporting import automatic_shapes, export
from fxprune.tracing.importing import import_program, place_of
from tests.small import PackedTagger, TiedModel, frames


def imported(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    call = (args, kwargs)
    model.eval()
    return import_program(export(model, call, automatic_shapes(model, call)), call)


def targets(program: Program) -> list[Any]:
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def test_markers_become_functions() -> None:
    found = targets(imported(PackedTagger(), frames(), torch.tensor([3, 5])))
    assert found.count(recurrent.lstm) == 2
    assert found.count(packing.pad_packed) == 1
    assert not any("fxprune::" in str(getattr(t, "_schema", "")) for t in found)


def test_each_tensor_has_one_node_of_its_name_and_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied = TiedModel()
            self.scale: Tensor
            self.register_buffer("scale", torch.ones(11))
            self.register_buffer("hidden", torch.ones(11), persistent=False)

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.tied(tokens) * self.scale + self.get_buffer("hidden")
            return y + torch.arange(11)

    program = imported(Model(), torch.tensor([[1, 2]]))
    names = [n.target for n in program.graph.nodes if n.op == "get_attr"]
    assert len(names) == len(set(names))
    assert program.kinds["scale"] is Kind.BUFFER
    assert program.kinds["hidden"] is Kind.BUFFER
    assert program.kinds["tied.embedding.weight"] is Kind.PARAMETER
    assert program.aliases == {"tied.decoder.weight": "tied.embedding.weight"}


def test_in_place_operations_become_pure() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y.add_(1).relu_()
            y[:, 0] = 0
            return nn.functional.dropout(y, 0.5, self.training, inplace=True)

    program = imported(Model(), frames())
    for target in targets(program):
        schema = getattr(target, "_schema", None)
        assert schema is None or not schema.is_mutable
    x = frames(3, 4)
    torch.testing.assert_close(program.module()(x), Model().eval()(x))
    assert any("dropout" in str(t) for t in targets(program))


def test_checks_of_the_export_are_dropped() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[1] > 1)
            return x.to(torch.float64)

    assert all("assert" not in str(t) for t in targets(imported(Model(), frames())))


def test_a_changed_input_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return x + 1

    with pytest.raises(TraceError, match="changes its input 'x' in place; work on a copy"):
        imported(Model(), frames())


def test_a_changed_buffer_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("seen").add_(1)
            return x + 1

    with pytest.raises(TraceError, match="updates the buffer 'seen' in eval mode"):
        imported(Model(), frames())


class Branches(nn.Module):
    """Runs one of two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        """Adds or subtracts."""
        y: Tensor = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
        return y


class Maps(nn.Module):
    """Maps over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Applies a layer to every row."""
        y: Tensor = torch.vmap(self.linear)(x)
        return y


class Derives(nn.Module):
    """Computes a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Doubles."""
        y: Tensor = torch.func.grad(lambda v: (v**2).sum())(x)
        return y + torch.zeros(1)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Branches(), r"uses cond, at \S*test_importing.py:.*runs a part of the graph of its own"),
        (Maps(), r"uses torch.vmap or .* of torch.func, at \S*test_importing.py:.*torch.vmap"),
        (Derives(), r"uses torch.vmap or another transform of torch.func, at \S*test_importing"),
    ],
)
def test_operations_on_graphs_are_refused(model: nn.Module, text: str) -> None:
    with pytest.raises(UnsupportedOpError, match=text) as caught:
        fxprune.trace(model, frames())
    assert caught.value.target


def test_an_output_that_depends_on_sizes_only_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x.shape[0]

    with pytest.raises(TraceError, match=r"output 1 of the model is .* not a tensor"):
        imported(Model(), frames())


def test_places_name_file_line_and_code() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sigmoid()

    program = imported(Model(), frames())
    (node,) = (n for n in program.graph.nodes if n.op == "call_function")
    place = place_of(node)
    assert place.startswith(", at ")
    assert "test_importing.py:" in place
    assert place.endswith("(return x.sigmoid())")
    node.meta.pop("stack_trace")
    assert place_of(node) == ""


def test_inputs_are_described() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, more: Any, flag: bool = True) -> Tensor:
            return x + more["a"] if flag else x

    program = imported(Model(), frames(), {"a": torch.zeros(3)}, False)
    assert [spec.name for spec in program.inputs] == ["x", "more_a", "flag"]
    assert program.inputs[2].shape is None
    assert program.inputs[0].shape is not None
    assert [type(s) for s in program.inputs[0].shape] == [str, str, str]
