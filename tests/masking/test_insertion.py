"""The masked program is the program with zeros where masks cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.masking.insertion import insert_masks
from fxprune.masking.masks import Masks
from fxprune.program import Kind, Program
from tests.analysis.sandwich import Sandwich, check_exact
from tests.small import Tagger, frames


@pytest.fixture
def program() -> Program:
    return fxprune.trace(Tagger(), (frames(), torch.ones(1, 2, 6)))


def masked(program: Program, masks: Masks) -> nn.Module:
    return insert_masks(replace(program, masks=masks), analyze(program)).module()


def by_hand(program: Program, **changes: Tensor) -> nn.Module:
    """The program with tensors multiplied by hand."""
    tensors = {
        name: nn.Parameter(tensor.detach() * changes.get(name.replace(".", "_"), 1.0))
        for name, tensor in program.tensors.items()
    }
    return replace(program, tensors=tensors).module()


def same(a: nn.Module, b: nn.Module) -> None:
    call = (frames(3, 4), torch.randn(1, 3, 6))
    for left, right in zip(a(*call), b(*call), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_no_masks_no_nodes(program: Program) -> None:
    result = insert_masks(program, analyze(program))
    assert result.graph is program.graph
    assert result.tensors is program.tensors


def test_connections_multiply_their_weight(program: Program) -> None:
    keep = torch.rand(18, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    masks = Masks(connections={"rnn.weight_hh_l0": keep})
    same(masked(program, masks), by_hand(program, rnn_weight_hh_l0=keep.float()))


def test_a_cut_neuron_loses_every_block_that_leaves_it_and_its_state(program: Program) -> None:
    units = analyze(program).group("rnn.l0").neurons
    keep = torch.ones(6)
    keep[[1, 4]] = 0
    module = masked(program, Masks().cut_neurons(units[[1, 4]]))
    expected = by_hand(program, rnn_weight_hh_l0=keep, head_weight=keep)
    call = (frames(3, 4), torch.randn(1, 3, 6))
    tags, final = module(*call)
    torch.testing.assert_close(tags, expected(*call)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(final, expected(*call)[1] * keep, rtol=1e-6, atol=1e-6)


def test_shapes_and_tensors_of_the_user_stay(program: Program) -> None:
    units = analyze(program).group("stem").neurons
    result = insert_masks(replace(program, masks=Masks().cut_neurons(units[:2])), analyze(program))
    for name, tensor in program.tensors.items():
        assert result.tensors[name] is tensor
    added = set(result.tensors) - set(program.tensors)
    assert added
    assert {result.kinds[name] for name in added} == {Kind.CONSTANT}
    assert result.masks.empty
    assert [n.name for n in program.graph.nodes if "gate" in n.name] == []


def test_equal_gates_are_one_tensor() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 6)
            self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.stem(x)
            return [head(y) for head in self.heads]

    program = fxprune.trace(Model(), frames())
    neurons = analyze(program)
    cut = Masks().cut_neurons(neurons.group("stem").neurons[:1])
    result = insert_masks(replace(program, masks=cut), neurons)
    assert len(set(result.tensors) - set(program.tensors)) == 1


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, elementwise_affine=False)], ids=str
)
def test_normalizations_leave_cut_neurons_out(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 6), norm, nn.Linear(6, 2))
    program = fxprune.trace(model, frames())
    cut = analyze(program).group("0").neurons[[0, 3]]
    module = masked(program, Masks().cut_neurons(cut))
    left = [1, 2, 4, 5]
    hidden = model[0](frames())[..., left]
    small = type(norm)(4)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(1.0 if parameter is small.weight else 0.0)
    head = model[2]
    assert isinstance(head, nn.Linear)
    expected = nn.functional.linear(small(hidden), head.weight[:, left], head.bias)
    torch.testing.assert_close(module(frames()), expected, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One weight in two places of one operation, between two layers."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.operation(self.stem(x), self.weight))
        return y


def tied(layer: nn.Module, *names: str) -> nn.Module:
    """A layer between two others, whose weights are one."""
    for name in names:
        setattr(layer, f"weight_hh{name}", getattr(layer, f"weight_ih{name}"))
    return Sandwich(FirstOf(layer))


class FirstOf(nn.Module):
    """A recurrent layer's outputs, or a cell's after two steps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNBase):
            result: Any = self.layer(x)
        else:
            result = self.layer(x[:, 1], self.layer(x[:, 0]))
        y: Tensor = result[0] if isinstance(result, tuple) else result
        return y


@pytest.mark.parametrize(
    ("model", "classes"),
    [
        (tied(nn.LSTM(8, 8), "_l0"), {"input", "recurrent"}),
        (tied(nn.GRUCell(8, 8), ""), {"input", "recurrent"}),
        (tied(nn.LSTMCell(8, 8), ""), {"input", "recurrent"}),
        (Twice(lambda h, w: h @ (w @ w)), {"feedforward"}),
        (Twice(lambda h, w: h @ torch.einsum("ij,jk->ik", w, w)), {"feedforward"}),
    ],
    ids=["lstm", "gru-cell", "lstm-cell", "matmul", "einsum"],
)
def test_one_tensor_in_two_places_is_gated_where_it_is_meant(
    model: nn.Module, classes: set[str]
) -> None:
    compact = check_exact(model)
    assert compact.report.parameters_after < compact.report.parameters_before
    ends = {"stem.weight", "head.weight"}
    found = [b for b in compact.report.counts.blocks if b.name not in ends]
    assert {b.connection_class.value for b in found} == classes
    assert len(found) == len(classes)


class LowRank(nn.Module):
    """A linear map whose weight is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(5, 2)
        self.down, self.up = (nn.Parameter(torch.randn(n)) for n in ((6, 2), (2, 5)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stem(x) @ (self.down @ self.up))
        return y


def test_a_weight_that_is_computed_is_gated_as_a_value() -> None:
    model = LowRank().double()
    x = frames(2, 4).double()
    program = fxprune.trace(model, x)
    cut = analyze(program).group("stem").neurons[[1, 4]]
    keep = torch.ones(6, 1, dtype=torch.float64)
    keep[[1, 4]] = 0
    expected = model.head(model.stem(x) @ (keep * model.down @ model.up))
    torch.testing.assert_close(masked(program, Masks().cut_neurons(cut))(x), expected)
    assert check_exact(LowRank()).module.get_parameter("down").shape[0] < 6


def test_einsum_weights_are_gated() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 6)
            self.weight = nn.Parameter(torch.randn(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("btc,cd->btd", self.stem(x), self.weight)

    model = Model()
    program = fxprune.trace(model, frames())
    cut = analyze(program).group("stem").neurons[[2]]
    keep = torch.ones(6, 1)
    keep[2] = 0
    expected = torch.einsum("btc,cd->btd", model.stem(frames()), model.weight * keep)
    found = masked(program, Masks().cut_neurons(cut))(frames())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
