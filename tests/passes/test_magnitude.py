"""Magnitude pruning against scores and counts made the slow way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.analysis import Group, Neurons
from fxprune.contract import Facts, NeuronAnalysis
from fxprune.errors import ConfigError, PreconditionError
from fxprune.masking.masks import Masks
from fxprune.passes.magnitude import Magnitude
from fxprune.program import Program, Refusal
from fxprune.shrinking.liveness import alive_neurons
from fxprune.tracing.tracer import trace
from tests.passes.tagging import prune
from tests.zoo import by_name

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

FLOOR = "kept its best one, though it was among the lowest: none may go empty"


class Tagger(nn.Module):
    """Linear, LSTM, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.rnn = nn.LSTM(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(torch.relu(self.stem(x)))[0])
        return y


@pytest.fixture
def tagger() -> Program:
    return trace(Tagger(), torch.zeros(4, 2, 3))


def analysis(program: Program) -> Neurons:
    return Facts(program)[NeuronAnalysis]


def slow_score(program: Program, neurons: Neurons, neuron: int, norm: int) -> float:
    """Mean of |w|**norm over every entry that begins or ends at the neuron, each once."""
    values = []
    for name in {b.weight for b in neurons.blocks}:
        weight = program.tensors[name]
        own = torch.zeros(weight.shape, dtype=torch.bool)
        for block in neurons.blocks:
            if block.weight == name:
                assert block.direct
                own |= (block.sources == neuron) | (block.destinations == neuron)
        values.extend(weight[own].abs().double().pow(norm).tolist())
    return math.fsum(values) / len(values)


def lowest(scores: dict[Any, float], sparsity: float) -> set[Any]:
    """Keys in order; the first go first among equals."""
    order = sorted(scores, key=lambda key: scores[key])
    return set(order[: math.floor(sparsity * len(scores) + 1e-9)])


def slow_neurons(program: Program, magnitude: Magnitude) -> set[int]:
    neurons = analysis(program)
    alive = alive_neurons(neurons, program.masks)

    def scores(*groups: Group) -> dict[int, float]:
        ids = torch.cat([g.neurons for g in groups]).tolist() if groups else []
        able = [i for i in ids if neurons.free[i] and alive[i]]
        return {i: slow_score(program, neurons, i, magnitude.norm) for i in able}

    everything = neurons.groups
    scopes: dict[str, list[tuple[Group, ...]]] = {
        "group": [(g,) for g in everything],
        "global": [everything],
        "class": [tuple(g for g in everything if g.recurrent is r) for r in (False, True)],
    }
    return set().union(
        *(lowest(scores(*scope), magnitude.sparsity) for scope in scopes[magnitude.scope])
    )


ZOO = [
    "lstm-projected-two-layer",
    "tied-projected-lm",
    "conv-lstm",
    "same-gru-twice",
    "gru-cell-loop",
]


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize(
    "magnitude",
    [Magnitude(0.5), Magnitude(0.3, norm=2), Magnitude(0.25, scope="class")],
    ids=str,
)
def test_neurons_with_the_lowest_scores_go(model: str, magnitude: Magnitude) -> None:
    known = by_name(model)
    program = trace(known.build(), known.inputs(known.batch, known.time))
    expected = slow_neurons(program, magnitude)
    assert expected
    assert set(prune(program, magnitude).program.masks.neurons.tolist()) == expected


def test_global_scope_compares_all_neurons(tagger: Program) -> None:
    program = scaled(tagger, "stem", 1.2)
    magnitude = Magnitude(0.6, scope="global")
    expected = slow_neurons(program, magnitude)
    assert len(expected) == 6
    assert set(prune(program, magnitude).program.masks.neurons.tolist()) == expected


def scaled(program: Program, prefix: str, factor: float) -> Program:
    tensors = {
        n: nn.Parameter(t.detach() * factor) if n.startswith(prefix) else t
        for n, t in program.tensors.items()
    }
    return replace(program, tensors=tensors)


def test_rearranged_weight_is_scored_like_a_plain_one() -> None:
    class Transposed(nn.Module):
        def __init__(self, first: Tensor, second: Tensor) -> None:
            super().__init__()
            self.first = nn.Parameter(first.detach().T.clone())  # [in, out]
            self.second = nn.Parameter(second.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.first @ self.second.t()

    plain = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(8, 2, bias=False))
    x = torch.zeros(1, 3)
    programs = trace(plain, x), trace(Transposed(*plain.parameters()), x)
    cut = []
    for program in programs:
        neurons = analysis(program)
        hidden = next(g for g in neurons.groups if g.size == 8)
        masks = prune(program, Magnitude(0.5)).program.masks
        cut.append(torch.isin(hidden.neurons, masks.neurons).nonzero().flatten().tolist())
    assert len(cut[0]) == 4
    assert cut[0] == cut[1]


def test_later_passes_count_what_is_left(tagger: Program) -> None:
    outcome = prune(tagger, Magnitude(0.5), Magnitude(0.5))
    neurons = analysis(tagger)
    left = [
        g.size - int(torch.isin(g.neurons, outcome.program.masks.neurons).sum())
        for g in neurons.groups
    ]
    # floor(0.5 * 6), floor(0.5 * 3); floor(0.5 * 5), floor(0.5 * 3)
    assert left == [3, 2, 2, 2]


def test_dead_neurons_and_their_connections_do_not_count(tagger: Program) -> None:
    neurons = analysis(tagger)
    stem = neurons.group("stem").neurons
    # Nothing reads the two heaviest: they are neither counted nor compared.
    keep = torch.ones(20, 6, dtype=torch.bool)
    keep[:, :2] = False
    program = replace(tagger, masks=Masks(connections={"rnn.weight_ih_l0": keep}))
    weight = tagger.tensors["stem.weight"].detach().clone()
    weight[:2] = 9
    program = replace(program, tensors={**tagger.tensors, "stem.weight": nn.Parameter(weight)})
    after = prune(program, Magnitude(0.5)).program.masks
    expected = {k: slow_score(program, neurons, int(stem[k]), 1) for k in range(2, 6)}
    assert {k for k in range(6) if stem[k] in after.neurons} == lowest(expected, 0.5)
    single = prune(program, Magnitude(0.5, "connection")).program.masks.connections
    assert int((~single["stem.weight"]).sum()) == 4 * 3 // 2
    assert bool(single["stem.weight"][:2].all())
    assert int((~single["rnn.weight_ih_l0"]).sum()) == 2 * 20 + 4 * 20 // 2


# Connections -------------------------------------------------------------------------------------

CLASSES = {
    "stem.weight": "feedforward",
    "rnn.weight_ih_l0": "input",
    "rnn.weight_hh_l0": "recurrent",
    "head.weight": "feedforward",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["group", "global", "class"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_smallest_connections_are_masked(scope: Any, sparsity: float, dtype: torch.dtype) -> None:
    program = trace(Tagger(), torch.zeros(4, 2, 3))
    # Few different values make many ties.
    tensors = {
        n: nn.Parameter((t.detach() * 20).round().div(20).to(dtype))
        for n, t in program.tensors.items()
    }
    program = replace(program, tensors=tensors)
    masks = prune(program, Magnitude(sparsity, "connection", scope)).program.masks
    scopes = {
        "group": [[n] for n in CLASSES],
        "global": [list(CLASSES)],
        "class": [[n for n in CLASSES if CLASSES[n] == c] for c in set(CLASSES.values())],
    }
    for names in scopes[scope]:
        scores = {
            (n, i): abs(v) for n in names for i, v in enumerate(tensors[n].flatten().tolist())
        }
        gone = {
            (n, i)
            for n in names
            if n in masks.connections
            for i in (~masks.connections[n]).flatten().nonzero().flatten().tolist()
        }
        assert gone == lowest(scores, sparsity)
    assert len(masks.neurons) == 0


def test_connection_masks_add_up(tagger: Program) -> None:
    once = prune(tagger, Magnitude(0.5, "connection")).program
    twice = prune(once, Magnitude(0.5, "connection")).program.masks.connections["rnn.weight_ih_l0"]
    assert int((~twice).sum()) == 60 + 30
    assert bool((once.masks.connections["rnn.weight_ih_l0"] >= twice).all())


def test_connection_masks_have_no_floor(tagger: Program) -> None:
    outcome = prune(tagger, Magnitude(1 - 1e-12, "connection"))
    assert not any(bool(m.any()) for m in outcome.program.masks.connections.values())
    assert outcome.refusals == ()


def test_biases_and_gains_are_never_masked() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    program = trace(model, torch.zeros(1, 3))
    masks = prune(program, Magnitude(0.9, "connection")).program.masks
    assert set(masks.connections) == {"0.weight", "2.weight"}


def test_tied_weight_is_one_weight() -> None:
    known = by_name("tied-projected-lm")
    program = trace(known.build(), known.inputs(known.batch, known.time))
    weight = program.tensors["embedding.weight"]
    masks = prune(program, Magnitude(0.5, "connection")).program.masks
    assert int((~masks.connections["embedding.weight"]).sum()) == weight.numel() // 2


# Rows and columns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["row", "column"])
@pytest.mark.parametrize("norm", [1, 2])
def test_lowest_rows_and_columns_are_masked(tagger: Program, structure: Any, norm: Any) -> None:
    masks = prune(tagger, Magnitude(0.5, structure, norm=norm)).program.masks
    assert CLASSES.keys() - masks.connections.keys() <= {"head.weight"}  # see the next test
    for name in CLASSES.keys() & masks.connections.keys():
        weight = tagger.tensors[name].detach()
        weight = weight if structure == "row" else weight.T
        scores = {i: float(r.double().abs().pow(norm).mean()) for i, r in enumerate(weight)}
        keep = masks.connections[name]
        keep = keep if structure == "row" else keep.T
        gone = {i for i in range(len(keep)) if not bool(keep[i].any())}
        assert gone == lowest(scores, 0.5)
        assert int((~keep).sum()) == len(gone) * keep.shape[1]


def test_rows_of_neurons_that_must_stay_are_kept(tagger: Program) -> None:
    outcome = prune(tagger, Magnitude(0.5, "row"))
    assert "head.weight" not in outcome.program.masks.connections
    assert Refusal("head.weight", "2 rows stay, as their neurons must") in outcome.refusals
    columns = prune(tagger, Magnitude(0.5, "column")).program.masks.connections
    assert not bool(columns["head.weight"].all())


def test_rows_are_outputs_whichever_way_the_weight_lies() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.up = nn.ConvTranspose1d(4, 6, 3)
            self.out = nn.Parameter(torch.randn(6, 2))

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.up(self.embedding(tokens).transpose(1, 2)).transpose(1, 2) @ self.out
            return y

    program = trace(Model(), torch.zeros(1, 5, dtype=torch.long))
    rows = prune(program, Magnitude(0.5, "row")).program.masks.connections
    columns = prune(program, Magnitude(0.5, "column")).program.masks.connections
    assert {name: int((~keep).sum()) for name, keep in rows.items()} == {
        "embedding.weight": 2 * 10,  # channels
        "up.weight": 3 * 4 * 3,  # output channels
    }
    assert {name: int((~keep).sum()) for name, keep in columns.items()} == {
        "embedding.weight": 5 * 4,  # rows of the table
        "up.weight": 6 * 6,  # input channels at kernel places
        "out": 3 * 2,
    }


@pytest.mark.parametrize(
    ("structure", "scope"), [("row", "global"), ("column", "global"), ("column", "class")]
)
def test_weights_keep_a_position(tagger: Program, structure: Any, scope: Any) -> None:
    outcome = prune(scaled(tagger, "stem", 1e-6), Magnitude(0.9, structure, scope))
    stem = outcome.program.masks.connections["stem.weight"]
    assert int(stem.any(dim=1 if structure == "row" else 0).sum()) == 1
    assert Refusal("stem.weight", FLOOR) in outcome.refusals


# Floors, ties, refusals ---------------------------------------------------------------------------


def test_floor_of_a_group_wins_and_is_reported(tagger: Program) -> None:
    program = scaled(tagger, "stem", 1e-6)
    program = scaled(program, "rnn.weight_ih", 1e-6)
    outcome = prune(program, Magnitude(0.6, scope="global"))
    neurons = analysis(program)
    stem = neurons.group("stem").neurons
    kept = [int(i) for i in stem if i not in outcome.program.masks.neurons]
    scores = {int(i): slow_score(program, neurons, int(i), 1) for i in stem}
    assert kept == [max(scores, key=lambda i: scores[i])]
    assert len(outcome.program.masks.neurons) == math.floor(0.6 * 11)  # others fill the gap
    assert Refusal("stem", FLOOR) in outcome.refusals


def test_extreme_sparsity_keeps_one_neuron_per_group(tagger: Program) -> None:
    outcome = prune(tagger, Magnitude(1 - 1e-12))
    assert len(outcome.program.masks.neurons) == 5 + 4
    assert [r.node for r in outcome.refusals if r.reason == FLOOR] == ["stem", "rnn.l0"]


def test_ties_go_in_order(tagger: Program) -> None:
    tensors = {n: nn.Parameter(torch.ones_like(t)) for n, t in tagger.tensors.items()}
    program = replace(tagger, tensors=tensors)
    neurons = analysis(program)
    masks = prune(program, Magnitude(0.5)).program.masks
    expected = [*neurons.group("stem").neurons[:3], *neurons.group("rnn.l0").neurons[:2]]
    assert masks.neurons.tolist() == sorted(int(i) for i in expected)


def test_scores_are_finer_than_float32(tagger: Program) -> None:
    tensors = {n: nn.Parameter(torch.ones_like(t)) for n, t in tagger.tensors.items()}
    tensors["stem.weight"].data[4, 0] = 1 - 2**-24  # lost in a float32 mean of 23 weights
    program = replace(tagger, tensors=tensors)
    stem = analysis(program).group("stem").neurons
    masks = prune(program, Magnitude(0.2)).program.masks
    assert stem[4] in masks.neurons
    assert stem[0] not in masks.neurons


def test_nothing_is_asked_of_sparsity_zero(tagger: Program) -> None:
    for structure in ("neuron", "row", "column", "connection"):
        outcome = prune(tagger, Magnitude(0, structure))
        assert outcome.program is tagger


def test_protected_tensors_and_their_neurons_stay(tagger: Program) -> None:
    outcome = prune(tagger, Magnitude(0.5), protect=("rnn.*",))
    neurons = analysis(tagger)
    cut = outcome.program.masks.neurons
    assert torch.isin(cut, neurons.group("stem").neurons).all()
    assert len(cut) == 3
    assert Refusal("rnn.l0", "5 of 5 neurons stay: protected") in outcome.refusals
    outcome = prune(tagger, Magnitude(0.5, "connection", "global"), protect=("rnn.weight_hh*",))
    masks = outcome.program.masks.connections
    assert "rnn.weight_hh_l0" not in masks
    assert sum(int((~m).sum()) for m in masks.values()) == (18 + 120 + 10) // 2
    assert outcome.refusals == (Refusal("rnn.weight_hh_l0", "protected"),)


def test_that_inputs_and_outputs_stay_goes_without_saying(tagger: Program) -> None:
    assert prune(tagger, Magnitude(0.5)).refusals == ()


def test_layers_that_are_held_back_are_reported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.residual, self.hidden = nn.Linear(3, 3), nn.Linear(3, 4)
            self.shown, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.shown(self.hidden(x + self.residual(x)))
            return y, self.head(y)

    assert prune(trace(Model(), torch.zeros(2, 3)), Magnitude(0.5)).refusals == (
        Refusal("x", "3 of 3 neurons stay: input of the model"),
        Refusal("shown", "5 of 5 neurons stay: output of the model"),
    )


def test_positions_and_buffers_are_left_with_a_reason() -> None:
    class Model(nn.Module):
        basis: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.randn(1, 4))
            self.register_buffer("basis", torch.randn(4, 5))
            self.out = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out((x + self.place) @ self.basis)
            return y

    outcome = prune(trace(Model(), torch.zeros(3, 4)), Magnitude(0.5, "connection"))
    assert set(outcome.program.masks.connections) == {"out.weight"}
    assert set(outcome.refusals) == {
        Refusal("place", "no operation reads it as connections between neurons"),
        Refusal("basis", "not a parameter: its values are fixed"),
    }


def test_model_without_free_neurons_is_refused_for_neurons_only() -> None:
    program = trace(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    with pytest.raises(PreconditionError) as caught:
        prune(program, Magnitude(0.5))
    assert str(caught.value) == (
        "pass 'magnitude': no neuron of this model may be removed (input_1: input of the model; "
        "0: output of the model). Prune connections instead, or give the model a hidden layer."
    )
    assert prune(program, Magnitude(0)).program is program
    masks = prune(program, Magnitude(0.5, "connection")).program.masks
    assert int((~masks.connections["0.weight"]).sum()) == 3


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), "0.5", None])
def test_sparsity_is_checked(sparsity: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"option 'sparsity' of pass 'magnitude' must be a number"
    ):
        Magnitude(sparsity)


@pytest.mark.parametrize(
    "options", [{"structure": "unit"}, {"scope": "all"}, {"norm": 3}, {"norm": 1.0}]
)
def test_choices_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=f"option '{next(iter(options))}' of pass 'magnitude' must"
    ):
        Magnitude(0.5, **options)


@pytest.mark.parametrize(
    ("sparsity", "round_to", "left"),
    [
        (0.5, 1, [3, 3]),  # of the 6 and 5 that there are
        (0.5, 2, [4, 4]),
        (0.9, 4, [4, 4]),
        (0.5, 4, [4, 4]),
        (0.5, 8, [6, 5]),  # there are no 8
        (0.0, 4, [6, 5]),
    ],
)
def test_groups_keep_a_multiple(
    tagger: Program, sparsity: float, round_to: int, left: list[int]
) -> None:
    neurons = analysis(tagger)
    cut = prune(tagger, Magnitude(sparsity, round_to=round_to)).program.masks.neurons
    exact = prune(tagger, Magnitude(sparsity)).program.masks.neurons
    groups = [g for g in neurons.groups if bool(g.free.any())]
    assert [g.size - int(torch.isin(g.neurons, cut).sum()) for g in groups] == left
    for group in groups:  # what stays beside the exact choice is the best that would have gone
        scores = {n: slow_score(tagger, neurons, n, 1) for n in group.neurons.tolist()}
        gone = sorted((n for n in scores if n in exact), key=scores.__getitem__)
        assert {n for n in scores if n in cut} == set(
            gone[: len(scores) - left[groups.index(group)]]
        )


def test_only_numbers_of_neurons_are_rounded() -> None:
    with pytest.raises(ConfigError, match=r"'round_to' .* no effect with structure=row"):
        Magnitude(0.5, structure="row", round_to=8)
    with pytest.raises(ConfigError, match=r"'norm' .* no effect with structure=connection"):
        Magnitude(0.5, structure="connection", norm=2)
    with pytest.raises(ConfigError, match="at least 1"):
        Magnitude(0.5, round_to=0)
