"""Programs compute what the model does, at other sizes too, and leave the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import InputError
from fxprune.program import Kind
from fxprune.tracing.tracer import own_call
from tests.small import HALF, PackedTagger, Tagger, TiedModel, frames


def sizes(program: fxprune.Program, index: int = 0) -> tuple[int | str, ...]:
    shape = program.inputs[index].shape
    assert shape is not None
    return shape


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_and_time_are_free_even_if_the_example_has_one_of_each(batch: int) -> None:
    model = Tagger().eval()
    program = fxprune.trace(model, frames(batch, 1))
    assert [type(s) for s in sizes(program)] == [str, str, int]
    module = program.module()
    for x in (frames(3, 7), frames(1, 1), frames(5, 2)):
        torch.testing.assert_close(module(x), model(x), rtol=1e-6, atol=1e-6)


def test_parameters_are_the_models_own_under_its_names() -> None:
    model = TiedModel()
    program = fxprune.trace(model, torch.randint(0, 11, (2, 5)))
    assert program.tensors["embedding.weight"] is model.embedding.weight
    assert dict(program.aliases) == {"decoder.weight": "embedding.weight"}
    assert set(program.tensors) == set(dict(model.named_parameters()))
    assert set(program.kinds.values()) == {Kind.PARAMETER}


def test_tensors_created_in_forward_are_constants() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, 2.0, 3.0])

    program = fxprune.trace(Model(), frames())
    assert [k for k in program.kinds.values()] == [Kind.CONSTANT]
    assert torch.equal(program.module()(frames(1, 1)), Model()(frames(1, 1)))


def test_one_operation_per_layer_and_direction() -> None:
    program = fxprune.trace(nn.LSTM(3, 4, num_layers=3, bidirectional=True), frames(5, 2))
    assert len([n for n in program.graph.nodes if "lstm" in str(n.target)]) == 6
    assert all("fxprune::" not in str(n.target) for n in program.graph.nodes)


def test_sizes_that_the_code_fixes_are_told() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x.flatten(1))
            return y

    program = fxprune.trace(Flat(), frames(2, 5))
    assert sizes(program)[1:] == (5, 3)
    told = {refusal.node for refusal in program.refusals}
    assert {"x[1]", "x[2]"} <= told
    assert program.module()(frames(7, 5)).shape == (7, 2)
    with pytest.raises(InputError, match=r"input 'x' has shape \(2, 4, 3\).*\[any, 5, 3\]"):
        program.module()(frames(2, 4))


class Squeezed(nn.Module):
    """Drops dimensions of size 1 between two layers; all of them if no dimension is given."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.stem, self.head, self.dim = nn.Linear(3, 4), nn.Linear(4, 2), dim

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        y: Tensor = self.head(h.squeeze() if self.dim is None else h.squeeze(self.dim))
        return y


def rank_after_squeezing(program: fxprune.Program) -> int:
    (node,) = [n for n in program.graph.nodes if "squeeze" in str(n.target)]
    return len(node.meta["val"].shape)


@pytest.mark.parametrize("dim", [1, -2, None])
def test_a_size_of_1_that_is_squeezed_away_is_fixed(dim: int | None) -> None:
    model = Squeezed(dim)
    program = fxprune.trace(model, frames(2, 1))
    assert isinstance(sizes(program)[0], str)
    assert sizes(program)[1:] == (1, 3)
    assert rank_after_squeezing(program) == 2
    (reason,) = [r.reason for r in program.refusals if r.node == "x[1]"]
    assert "squeezes a size of 1" in reason
    module = program.module()
    for x in (frames(2, 1), frames(5, 1)):
        torch.testing.assert_close(module(x), model(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match=r"\[any, 1, 3\]"):
        module(frames(2, 3))


@pytest.mark.parametrize("dim", [1, -2, None])
def test_a_larger_size_that_squeeze_leaves_alone_is_free(dim: int | None) -> None:
    model = Squeezed(dim)
    program = fxprune.trace(model, frames(2, 3))
    assert [type(s) for s in sizes(program)] == [str, str, int]
    assert rank_after_squeezing(program) == 3
    assert [r.node for r in program.refusals] == ["x[2]"]
    module = program.module()
    for x in (frames(2, 3), frames(4, 7), frames(2, 1), frames(1, 1)):
        torch.testing.assert_close(module(x), model(x), rtol=1e-6, atol=1e-6)


def test_a_size_of_1_that_is_computed_and_squeezed_away_fixes_its_input() -> None:
    class Filtered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 2, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x).squeeze(2)
            return y

    model = Filtered()
    program = fxprune.trace(model, torch.ones(2, 3, 4))
    assert isinstance(sizes(program)[0], str)
    assert sizes(program)[1:] == (3, 4)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-6, atol=1e-6)


def test_neurons_around_a_squeezed_dimension_can_go() -> None:
    compact = fxprune.compile(Squeezed(1), HALF, example_inputs=frames(2, 1), progress=False)
    assert compact.module.get_parameter("stem.weight").shape == (2, 3)
    sizes = compact.report.verification.sizes
    assert sizes == ("example", "batch=4", "batch=1", "batch=3", "other values")


def test_a_loop_over_steps_fixes_the_time() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 4)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return h

    program = fxprune.trace(Loop(), frames(1, 5))
    assert isinstance(sizes(program)[0], str)
    assert sizes(program)[1:] == (5, 3)


def test_what_another_size_would_compute_wrongly_is_fixed() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1) / float(x.shape[1])

    model = Mean()
    program = fxprune.trace(model, frames(2, 5))
    module = program.module()
    for x in (frames(3, 5), frames(2, 8)):
        try:
            result = module(x)
        except InputError:
            assert isinstance(sizes(program)[1], int)
        else:
            torch.testing.assert_close(result, model(x))


def test_dynamic_shapes_are_honoured() -> None:
    batch = Dim("batch")
    program = fxprune.trace(nn.Linear(3, 4), frames(), dynamic_shapes={"input": {0: batch}})
    assert isinstance(sizes(program)[0], str)
    assert sizes(program)[1:] == (5, 3)
    static = fxprune.trace(nn.Linear(3, 4), frames(), dynamic_shapes={"input": None})
    assert sizes(static) == (2, 5, 3)


def test_inputs_that_must_agree_share_a_dimension() -> None:
    program = fxprune.trace(Tagger(), (frames(), torch.zeros(1, 2, 6)))
    assert sizes(program, 1) == (1, sizes(program)[0], 6)


def test_packed_sequences_keep_batch_and_time_free() -> None:
    model = PackedTagger().eval()
    program = fxprune.trace(model, (frames(1, 4), torch.tensor([4])))
    module = program.module()
    for x, lengths in ((frames(3, 6), [2, 6, 1]), (frames(1, 1), [1])):
        expected = model(x, torch.tensor(lengths))
        for a, b in zip(module(x, torch.tensor(lengths)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_example_is_the_programs_own() -> None:
    x = torch.zeros(5, 2, 3).transpose(0, 1)
    args, kwargs = own_call((x, {"a": [x]}))
    assert kwargs == {}
    leaves = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    assert all(leaf.is_contiguous() and leaf.data_ptr() != x.data_ptr() for leaf in leaves)
    program = fxprune.trace(nn.Linear(3, 4), x)
    x.fill_(7)
    assert float(program.example[0][0].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("given", "call"),
    [
        (1.5, None),
        ([1, 2], ((1, 2), {})),
        ({"x": 1}, ((), {"x": 1})),
        (((1,), {"x": 2}), ((1,), {"x": 2})),
        (({}, {}), (({}, {}), {})),
    ],
)
def test_forms_of_example_inputs(given: Any, call: Any) -> None:
    if call is None:
        with pytest.raises(fxprune.errors.ConfigError, match="example_inputs is float"):
            own_call(given)
    else:
        assert own_call(given) == call
