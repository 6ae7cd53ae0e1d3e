"""The contract: names and text forms from the class, facts within what is declared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from fxprune.analysis import Neurons
from fxprune.contract import (
    Analysis,
    Context,
    Effect,
    Facts,
    NeuronAnalysis,
    Pass,
    PassResult,
    check_choice,
    check_idle,
    check_number,
)
from fxprune.errors import ConfigError, PassError
from fxprune.passes import PASSES, load, names, table
from fxprune.passes.magnitude import Magnitude
from fxprune.program import Program
from fxprune.tracing.tracer import trace


class NodeCount(Analysis[int]):
    """How many nodes the graph has; counts how often it was asked to count."""

    calls: ClassVar[list[Program]] = []

    @classmethod
    def compute(cls, program: Program) -> int:
        cls.calls.append(program)
        return len(program.graph.nodes)


@dataclass(frozen=True)
class LSTMTwoWay(Pass):
    effect = Effect.LOSSY
    needs = (NodeCount,)

    amount: float
    kind: str = "soft"
    steps: tuple[int, ...] = (1, 2)
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number(self, "amount", 0, float("inf"))
        check_choice(self, "kind", ("soft", "hard"))

    def run(self, program: Program, facts: Facts) -> PassResult:
        return PassResult(program, changed=False)


@pytest.fixture
def program() -> Program:
    NodeCount.calls.clear()
    return trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))


def test_name_is_the_class_in_kebab_case() -> None:
    assert LSTMTwoWay.name == "lstm-two-way"
    assert Magnitude.name == "magnitude"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (LSTMTwoWay(1), "lstm-two-way{amount=1}"),
        (LSTMTwoWay(0.5, seed=3), "lstm-two-way{amount=0.5,seed=3}"),
        (LSTMTwoWay(2, "hard", (1,)), "lstm-two-way{amount=2,kind=hard,steps=[1]}"),
        (Magnitude(0.9, "row"), "magnitude{sparsity=0.9,structure=row}"),
    ],
)
def test_text_form_leaves_out_defaults(made: Pass, text: str) -> None:
    assert str(made) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"amount": -1},
            "option 'amount' of pass 'lstm-two-way' must be a number at least 0, not -1",
        ),
        (
            {"amount": True},
            "option 'amount' of pass 'lstm-two-way' must be a number at least 0, not True",
        ),
        (
            {"amount": float("nan")},
            "option 'amount' of pass 'lstm-two-way' must be a number at least 0, not nan",
        ),
        (
            {"amount": 1, "kind": "sotf"},
            "option 'kind' of pass 'lstm-two-way' must be one of soft, hard, not 'sotf'",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LSTMTwoWay(**options)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_options_without_effect_are_refused_with_the_reason() -> None:
    check_idle(LSTMTwoWay(1, steps=(1, 2)), ("steps", "seed"), "kind=soft")  # as by default
    with pytest.raises(ConfigError) as caught:
        check_idle(LSTMTwoWay(1, seed=0), ("steps", "seed"), "kind=soft")
    assert str(caught.value) == (
        "option 'seed' of pass 'lstm-two-way' has no effect with kind=soft: leave it out"
    )


def test_facts_are_computed_once_and_only_when_asked_for(program: Program) -> None:
    facts = Facts(program)
    assert NodeCount.calls == []
    assert facts[NodeCount] == len(program.graph.nodes)
    assert facts.for_pass(LSTMTwoWay(1))[NodeCount] == facts[NodeCount]
    assert len(NodeCount.calls) == 1
    assert NodeCount.calls[0] is program


def test_what_a_pass_finds_out_others_know(program: Program) -> None:
    facts = Facts(program)
    assert facts.for_pass(LSTMTwoWay(1))[NodeCount] == facts[NodeCount]
    assert len(NodeCount.calls) == 1


def test_undeclared_facts_are_refused_by_name(program: Program) -> None:
    facts = Facts(program, known={NeuronAnalysis: None}).for_pass(LSTMTwoWay(1))
    with pytest.raises(PassError) as caught:
        facts[NeuronAnalysis]
    assert str(caught.value) == (
        "class LSTMTwoWay asks for facts[NeuronAnalysis] without declaring it. "
        "Add NeuronAnalysis to LSTMTwoWay.needs."
    )
    assert caught.value.pass_name == "lstm-two-way"


def test_facts_of_a_changed_program_are_dropped_unless_kept(program: Program) -> None:
    facts = Facts(program, Context(protect=("0.*",)))
    count = facts[NodeCount]
    masked = replace(program, masks=program.masks.cut_neurons(torch.tensor([0])))
    assert facts.after(program, ()) is facts
    assert facts.after(masked, {NodeCount})[NodeCount] == count
    assert len(NodeCount.calls) == 1
    assert facts.after(masked, ())[NodeCount] == count
    assert len(NodeCount.calls) == 2
    assert facts.after(masked, ()).context is facts.context


def test_facts_are_never_kept_across_graphs(program: Program) -> None:
    facts = Facts(program)
    facts[NodeCount]
    graph, _ = program.copy_graph()
    copied = facts.after(replace(program, graph=graph), {NodeCount})
    assert copied[NodeCount] == len(graph.nodes)
    assert len(NodeCount.calls) == 2


def test_neurons_are_an_analysis(program: Program) -> None:
    found = Facts(program)[NeuronAnalysis]
    assert isinstance(found, Neurons)
    assert [g.size for g in found.groups] == [3, 4, 2]


def test_every_pass_of_the_table_follows_the_contract() -> None:
    assert names() == tuple(PASSES)
    assert list(table()) == list(PASSES)
    assert "sotf" not in table()
    for name in names():
        made = load(name)
        assert made is table()[name]
        assert issubclass(made, Pass)
        assert made.name == name
        assert isinstance(made.effect, Effect)
        assert dataclasses.is_dataclass(made)
        assert made.__dataclass_params__.frozen


def test_passes_can_be_imported_by_class_name() -> None:
    import fxprune.passes

    assert fxprune.passes.Magnitude is Magnitude
    with pytest.raises(AttributeError, match="has no attribute 'Magnitud'"):
        fxprune.passes.Magnitud  # noqa: B018 - the access is the test
