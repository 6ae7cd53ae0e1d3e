"""Programs become modules that call, name, switch and copy like the user's model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.program import Kind, check_constant, check_input, free_name
from fxprune.tracing import recurrent
from tests.small import Tagger, TiedModel, frames


class Batched(nn.Module):
    """Takes a dict and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor], extra: list[Any], *, gain: Tensor) -> Tensor:
        """Uses all of them."""
        y: Tensor = self.linear(batch["x"]) * gain + extra[0]
        return y


@pytest.mark.parametrize(
    ("model", "inputs", "names"),
    [
        (Tagger(), frames(), ["x"]),
        (Tagger(), (frames(), None), ["x", "state"]),
        (
            Tagger(nn.LSTM),
            (frames(), (torch.zeros(1, 2, 6), torch.zeros(1, 2, 6))),
            ["x", "state"],
        ),
        (
            Batched(),
            (({"x": frames()}, [torch.ones(2), None]), {"gain": torch.ones(1)}),
            ["batch", "extra", "gain"],
        ),
        (nn.Linear(3, 2), frames(), ["input"]),
    ],
)
def test_arguments_have_the_names_of_forward(
    model: nn.Module, inputs: Any, names: list[str]
) -> None:
    module = fxprune.trace(model, inputs).module()
    assert list(inspect.signature(module.forward).parameters) == names


def test_modules_run_over_the_programs_tensors() -> None:
    program = fxprune.trace(TiedModel(), torch.tensor([[1, 2]]))
    module: Any = program.module()
    assert module.embedding.weight is program.tensors["embedding.weight"]
    assert module.decoder.weight is module.embedding.weight
    assert program.module() is not module


def test_copies_of_the_graph_have_the_same_names() -> None:
    program = fxprune.trace(Tagger(), frames())
    graph, twins = program.copy_graph()
    assert [n.name for n in graph.nodes] == [n.name for n in program.graph.nodes]
    assert all(twins[n] is not n and twins[n].target == n.target for n in program.graph.nodes)
    first = next(iter(graph.nodes))
    first.meta["mark"] = 1
    assert "mark" not in next(iter(program.graph.nodes)).meta


def test_nodes_of_one_operation() -> None:
    program = fxprune.trace(nn.GRU(3, 4, num_layers=2), frames())
    assert len(program.nodes(recurrent.gru)) == 2
    assert program.nodes(recurrent.lstm) == []


def test_a_program_with_another_graph_takes_the_tensors_that_it_reads() -> None:
    program = fxprune.trace(Tagger(), frames())
    graph, _ = program.copy_graph()
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.create_node("get_attr", "used")
    extra = {**program.tensors, "used": torch.ones(1), "unused": torch.zeros(1)}
    result = program.with_graph(graph, extra)
    assert result.graph is graph
    assert set(result.tensors) == {*program.tensors, "used"}
    assert set(program.tensors) == set(dict(Tagger().named_parameters()))


def test_names_of_added_tensors_are_free() -> None:
    assert free_name("gate", {"weight", "bias"}) == "_gate_2"
    assert free_name("gate", {"weight", "_gate_2"}) == "_gate_3"


def test_buffers_stay_buffers() -> None:
    program = fxprune.trace(nn.BatchNorm1d(5), frames())
    assert program.kinds["running_mean"] is Kind.BUFFER
    module = program.module()
    assert set(dict(module.named_buffers())) == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


@pytest.mark.parametrize("shape", [(2, 3), (None, 3), (None, None)])
def test_inputs_of_the_right_shape_pass(shape: tuple[int | None, ...]) -> None:
    x = torch.zeros(2, 3)
    assert check_input(x, "x", shape) is x


@pytest.mark.parametrize("shape", [(1, 3), (None, 4), (None,), (2, 3, None)])
def test_inputs_of_other_shapes_do_not(shape: tuple[int | None, ...]) -> None:
    with pytest.raises(InputError, match=r"input 'x' has shape \(2, 3\).*traced for \["):
        check_input(torch.zeros(2, 3), "x", shape)


def test_constants() -> None:
    for value in (None, 3, 0.5, "text", True):
        check_constant(value, "flag", value)
    others: list[tuple[Any, Any]] = [(4, 3), (None, 3), (3, None), (torch.zeros(()), 3)]
    for value, traced in others:
        with pytest.raises(InputError, match=r"input 'flag' is .* was traced with"):
            check_constant(value, "flag", traced)
