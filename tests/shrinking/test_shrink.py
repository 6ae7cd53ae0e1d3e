"""Tensors are sliced to the indices reported, and the integer arguments of the graph follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.analysis import analyze
from fxprune.masking.insertion import insert_masks
from fxprune.masking.masks import Masks
from fxprune.program import Program
from fxprune.shrinking.compact import compact_program
from fxprune.shrinking.liveness import alive_neurons, kept_neurons
from fxprune.shrinking.shrink import shrink
from tests.small import Tagger, frames, tensors_of


@pytest.fixture
def program() -> Program:
    return fxprune.trace(Tagger(), (frames(), torch.ones(1, 2, 6)))


def cut(program: Program, name: str, *indices: int) -> Program:
    neurons = analyze(program)
    masks = program.masks.cut_neurons(neurons.group(name).neurons[list(indices)])
    return replace(program, masks=masks)


def test_sliced_tensors_are_those_indices(program: Program) -> None:
    program = cut(cut(program, "stem", 0, 3), "rnn.l0", 1, 2, 5)
    neurons = analyze(program)
    small = compact_program(program, neurons)
    stem, units = [1, 2, 4], [0, 3, 4]
    rows = [gate * 6 + unit for gate in range(3) for unit in units]
    expected = {
        "stem.weight": program.tensors["stem.weight"][stem],
        "stem.bias": program.tensors["stem.bias"][stem],
        "rnn.weight_ih_l0": program.tensors["rnn.weight_ih_l0"][rows][:, stem],
        "rnn.weight_hh_l0": program.tensors["rnn.weight_hh_l0"][rows][:, units],
        "rnn.bias_hh_l0": program.tensors["rnn.bias_hh_l0"][rows],
        "head.weight": program.tensors["head.weight"][:, units],
        "head.bias": program.tensors["head.bias"],
    }
    for name, tensor in expected.items():
        assert torch.equal(small.program.tensors[name], tensor)
    kept = small.kept["rnn.weight_hh_l0"]
    assert [k.tolist() if k is not None else None for k in kept] == [rows, units]
    assert small.kept["head.bias"] == (None,)


def test_the_original_is_left_as_it_was(program: Program) -> None:
    before = {n: t.detach().clone() for n, t in program.tensors.items()}
    nodes = [(n.name, n.args) for n in program.graph.nodes]
    pruned = cut(program, "rnn.l0", 0)
    small = compact_program(pruned, analyze(pruned)).program
    assert all(torch.equal(before[n], t) for n, t in program.tensors.items())
    assert [(n.name, n.args) for n in program.graph.nodes] == nodes
    storages = {t.data_ptr() for t in program.tensors.values()}
    assert storages.isdisjoint(t.data_ptr() for t in small.tensors.values() if t.numel())


def test_nothing_to_remove_copies_everything(program: Program) -> None:
    neurons = analyze(program)
    kept = kept_neurons(neurons, alive_neurons(neurons, Masks()), Masks())
    small = shrink(program, neurons, kept).program
    assert {n: t.shape for n, t in small.tensors.items()} == {
        n: t.shape for n, t in program.tensors.items()
    }
    x = (frames(3, 4), torch.ones(1, 3, 6))
    for a, b in zip(small.module()(*x), program.module()(*x), strict=True):
        assert torch.equal(a, b)


def test_states_keep_their_external_size(program: Program) -> None:
    program = cut(program, "rnn.l0", 1, 2, 5)
    neurons = analyze(program)
    compact = compact_program(program, neurons)
    masked, small = insert_masks(program, neurons).module(), compact.program.module()
    state = torch.randn(1, 2, 6)
    for a, b in zip(masked(frames(), state), small(frames(), state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    final = small(frames(), state)[1]
    assert final.shape == (1, 2, 6)
    assert not final[:, :, [1, 2, 5]].any()
    other = state.clone()
    other[:, :, [1, 2, 5]] = 9.0
    assert torch.equal(small(frames(), other)[1], final)


def test_states_shrink_where_asked() -> None:
    from tests.small import HALF

    compact = fxprune.compile(
        Tagger(),
        fxprune.Policy([HALF], states="shrink"),
        example_inputs=(frames(), torch.ones(1, 2, 6)),
        progress=False,
    )
    tags, state = compact.module(frames(), torch.ones(1, 2, 3))
    assert (tags.shape, state.shape) == ((2, 5, 2), (1, 2, 3))
    assert any("state" in note for note in compact.report.notes)


class Stateful(nn.Module):
    """Two GRU layers, whose states come in and go out."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, num_layers=2), nn.Linear(4, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [time, batch, 2], and the final states [2, batch, 4]."""
        y, h = self.rnn(x, h)
        return self.head(y), h


@pytest.mark.parametrize("unread", [("head.weight",), ("head.weight", "rnn.weight_hh_l0")])
def test_a_state_of_which_nothing_is_read_shrinks_to_one_unit(unread: tuple[str, ...]) -> None:
    x, h = torch.randn(5, 2, 3), torch.randn(2, 2, 4)
    program = fxprune.trace(Stateful(), (x, h))
    gone = {n: torch.zeros(program.tensors[n].shape, dtype=torch.bool) for n in unread}
    program = replace(program, masks=program.masks.cut_connections(gone))
    compact = fxprune.compile(program, fxprune.Policy([], states="shrink"), progress=False)
    scores, final = compact.module(x, h[..., :1])
    assert final.shape == (2, 2, 1)
    bias = program.tensors["head.bias"].detach()
    torch.testing.assert_close(scores, bias.expand(5, 2, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(final, compact.masked(x, h)[1][..., :1], rtol=0, atol=1e-6)


class Reshaped(nn.Module):
    """Sizes of neurons occur as numbers in many arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Reshapes, expands, splits and joins."""
        y = self.norm(self.stem(x)).reshape(-1, 8)
        y = y.view(x.shape[0], x.shape[1], 8) + torch.zeros(8, dtype=x.dtype)
        first, second = y.split([3, 5], -1)
        y = torch.cat([first, second[..., :5]], -1).unsqueeze(1).expand(-1, 2, -1, 8)
        z: Tensor = self.head(y.mean(1))
        return z


def test_integer_arguments_follow() -> None:
    from tests.small import HALF

    model = Reshaped()
    before = tensors_of(model)
    compact = fxprune.compile(model, HALF, example_inputs=frames(), progress=False)
    assert compact.module.get_parameter("head.weight").shape[1] < 8
    for x in (frames(), frames(1, 1), frames(4, 7)):
        torch.testing.assert_close(compact.module(x), compact.masked(x), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
