"""Groups, blocks and readers of small models, against what is written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune
from fxprune.analysis import Neurons, analyze
from fxprune.analysis.walker import Walker
from fxprune.tracing import packing
from tests.analysis.sandwich import check_exact
from tests.small import PackedTagger, Tagger, TiedModel, frames
from tests.zoo import by_name


def groups(neurons: Neurons) -> list[tuple[str, int, int, bool]]:
    return [(g.name, g.size, int(g.free.sum()), g.recurrent) for g in neurons.groups]


def blocks(neurons: Neurons) -> list[tuple[str, str | None, str, str]]:
    return [(b.name, b.source, b.destination, b.connection_class.value) for b in neurons.blocks]


def test_sizes_are_known_before_any_walk() -> None:
    program = fxprune.trace(PackedTagger(), (frames(2, 5), torch.tensor([5, 3])))
    (padded,) = program.nodes(packing.pad_packed)
    assert Walker(program, {}).shape(padded) == (5, 2, 12)


def test_a_recurrent_tagger() -> None:
    neurons = analyze(fxprune.trace(Tagger(), frames()))
    assert groups(neurons) == [
        ("x", 3, 0, False),
        ("stem", 5, 5, False),
        ("rnn.l0", 6, 6, True),
        ("head", 2, 0, False),
    ]
    assert blocks(neurons) == [
        ("stem.weight", "x", "stem", "feedforward"),
        ("rnn.weight_ih_l0", "stem", "rnn.l0", "input"),
        ("rnn.weight_hh_l0", "rnn.l0", "rnn.l0", "recurrent"),
        ("head.weight", "rnn.l0", "head", "feedforward"),
    ]
    reasons = {g.name: g.reason for g in neurons.groups}
    assert reasons == {
        "x": "input of the model",
        "stem": "",
        "rnn.l0": "",
        "head": "output of the model",
    }


def test_groups_are_disjoint_and_numbered() -> None:
    neurons = analyze(fxprune.trace(PackedTagger(), (frames(), torch.tensor([3, 5]))))
    every = torch.cat([g.neurons for g in neurons.groups])
    assert len(every) == len(every.unique()) == neurons.count
    index = neurons.group_of()
    for number, group in enumerate(neurons.groups):
        assert (index[group.neurons] == number).all()
        assert torch.equal(group.free, neurons.free[group.neurons])
        assert neurons.group(group.name) is group
    assert [g.name for g in neurons.groups] == ["x", "rnn.l0", "rnn.l0_reverse", "head"]


def test_unit_k_owns_row_k_of_every_gate() -> None:
    neurons = analyze(fxprune.trace(Tagger(nn.LSTM), frames()))
    units = neurons.group("rnn.l0").neurons
    rows, columns = neurons.owned["rnn.weight_hh_l0"]
    assert torch.equal(rows.reshape(4, 6), units.expand(4, 6))
    assert torch.equal(columns.reshape(-1), units)
    (bias,) = neurons.owned["rnn.bias_ih_l0"]
    assert torch.equal(bias.reshape(4, 6), units.expand(4, 6))
    _, head = neurons.owned["head.weight"]
    assert torch.equal(head.reshape(-1), units)


def test_a_tied_weight_has_a_block_for_each_use() -> None:
    neurons = analyze(fxprune.trace(TiedModel(), torch.tensor([[1, 2]])))
    assert [b.name for b in neurons.blocks if b.weight == "embedding.weight"] == [
        "embedding.weight",
        "embedding.weight#2",
    ]
    table, decoder = (b for b in neurons.blocks if b.weight == "embedding.weight")
    assert table.source is None
    assert torch.equal(table.destinations.reshape(-1), decoder.sources.reshape(-1))


class Merged(nn.Module):
    """Runs two linear layers as one, as some inference code does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps 3 to 2, through both layers and once more."""
        merged = torch.cat([self.a.weight, self.b.weight])
        y: Tensor = self.head(F.linear(x, merged).relu() + F.linear(-x, merged))
        return y


def test_a_weight_of_several_parts_names_them_all() -> None:
    neurons = analyze(fxprune.trace(Merged(), frames()))
    assert [(b.name, b.weight) for b in neurons.blocks] == [
        ("a.weight+b.weight", "a.weight"),
        ("a.weight+b.weight#2", "a.weight"),
        ("head.weight", "head.weight"),
    ]
    compact = check_exact(Merged(), frames())
    rows = [compact.module.get_parameter(n).shape[0] for n in ("a.weight", "b.weight")]
    assert sum(rows) == 5
    counted = [block.name for block in compact.report.counts.blocks]
    assert counted == ["a.weight+b.weight", "head.weight"]  # once, however often it is used


class Chain(nn.Module):
    """Two layers with a sum around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps 3 to 2."""
        y = self.first(x)
        z: Tensor = self.head(y + self.second(y).relu())
        return z


def test_a_residual_sum_makes_one_group() -> None:
    neurons = analyze(fxprune.trace(Chain(), frames()))
    assert groups(neurons) == [("x", 3, 0, False), ("first", 4, 4, False), ("head", 2, 0, False)]
    first, second = neurons.owned["first.weight"], neurons.owned["second.weight"]
    assert torch.equal(first[0], second[0])
    assert torch.equal(second[0].reshape(-1), second[1].reshape(-1))


def test_states_at_the_boundary_are_free() -> None:
    program = fxprune.trace(Tagger(), (frames(), torch.zeros(1, 2, 6)))
    neurons = analyze(program)
    assert not neurons.group("rnn.l0").frozen
    (entry,) = neurons.entries
    assert torch.equal(entry.neurons.reshape(-1), neurons.group("rnn.l0").neurons)
    (state,) = (r for r in neurons.readers if r.kind == "state")
    assert torch.equal(state.neurons.reshape(-1), neurons.group("rnn.l0").neurons)


STATES = torch.zeros(1, 2, 6)


@pytest.mark.parametrize(
    ("model", "state"),
    [
        (Tagger(nn.LSTM), (STATES, STATES)),
        (Tagger(nn.GRU), STATES),
        # One state for both layers: they lose the same units, so they are one group.
        (Tagger(nn.GRU, num_layers=2), torch.zeros(2, 2, 6)),
    ],
    ids=["lstm", "gru", "layers"],
)
def test_states_that_shrink_are_called_after_their_layer(model: nn.Module, state: Any) -> None:
    program = fxprune.trace(model, (frames(), state))
    neurons = analyze(replace(program, states="shrink"))
    assert groups(neurons) == [
        ("x", 3, 0, False),
        ("stem", 5, 5, False),
        ("rnn.l0", 6, 6, True),
        ("head", 2, 0, False),
    ]
    ends = {(b.source, b.destination) for b in neurons.blocks if b.weight.startswith("rnn.")}
    assert ends == {("stem", "rnn.l0"), ("rnn.l0", "rnn.l0")}


def test_a_state_that_leads_elsewhere_too_is_an_output_like_any_other() -> None:
    class Model(Tagger):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            y = self.rnn(torch.relu(self.stem(x)), state)[0]
            return self.head(y), y

    neurons = analyze(fxprune.trace(Model(), frames()))
    assert neurons.group("rnn.l0").reason == "output of the model"
    assert neurons.group("rnn.l0").frozen
    assert not neurons.group("stem").frozen


class HandWritten(nn.Module):
    """An Elman cell in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Reads the last state."""
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for step in x.unbind(1):
            h = torch.tanh(self.inp(step) + self.rec(h))
        y: Tensor = self.head(h)
        return y


def test_a_hand_written_loop() -> None:
    neurons = analyze(fxprune.trace(HandWritten(), frames(2, 3)))
    found = {(b.weight, b.connection_class.value) for b in neurons.blocks}
    assert found == {
        ("inp.weight", "input"),
        ("rec.weight", "recurrent"),
        ("head.weight", "feedforward"),
    }
    assert [b.name for b in neurons.blocks if b.weight == "rec.weight"] == [
        "rec.weight",
        "rec.weight#2",
        "rec.weight#3",
    ]
    assert int(neurons.free.sum()) == 4


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Chain(), (frames(),)),
        (HandWritten(), (frames(2, 3),)),
        (Tagger(nn.LSTM, num_layers=2, bidirectional=True), (frames(),)),
        (Tagger(nn.RNN), (frames(), torch.ones(1, 2, 6))),
        (PackedTagger(), (frames(), torch.tensor([3, 5]))),
        (TiedModel(), (torch.tensor([[1, 2, 3]]),)),
    ],
    ids=["residual", "loop", "stack", "states", "packed", "tied"],
)
def test_free_neurons_go_exactly(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    compact = check_exact(model, *inputs)
    assert compact.report.parameters_after < compact.report.parameters_before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("manual-gru", True),
        ("manual-lstm", True),
        ("iterated-residual", True),
        ("gru-cell-loop", True),
        ("mlp", False),
        ("causal-convs", True),
        ("lenet", False),
    ],
)
def test_what_a_loop_carries_is_recurrent(name: str, expected: bool) -> None:
    model = by_name(name)
    inputs = model.inputs(model.batch, model.time)
    neurons = analyze(fxprune.trace(model.build().eval(), inputs))
    assert any(g.recurrent for g in neurons.groups) is expected
