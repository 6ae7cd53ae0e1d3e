"""The pipeline: what it passes on, what it checks, and whom it blames."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxprune.analysis import Neurons
from fxprune.contract import Context, Effect, Facts, NeuronAnalysis, Pass, PassResult, Refusal
from fxprune.errors import (
    ConfigError,
    FxpruneError,
    PassError,
    PostconditionError,
    PreconditionError,
    VerificationError,
)
from fxprune.pipeline import fingerprint, run_passes
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from fxprune.training.task import Task


@dataclass(frozen=True)
class Cut(Pass):
    """Cuts one neuron of the first layer."""

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})

    neuron: int = 0

    def run(self, program: Program, facts: Facts) -> PassResult:
        neurons = facts[NeuronAnalysis].group("0").neurons[self.neuron : self.neuron + 1]
        masks = program.masks.cut_neurons(neurons)
        changed = not masks.same_as(program.masks)
        refusals = () if changed else (Refusal("0", "cut already"),)
        return PassResult(replace(program, masks=masks) if changed else program, changed, refusals)


@dataclass(frozen=True)
class Odd(Pass):
    """Does whatever a test wants done."""

    effect = Effect.LOSSY

    body: Callable[[Program], Any]

    def run(self, program: Program, facts: Facts) -> PassResult:
        result: PassResult = self.body(program)
        return result

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class OddExact(Odd):
    effect = Effect.EXACT


@dataclass(frozen=True)
class Trains(Pass):
    effect = Effect.LOSSY
    needs_task = True

    def run(self, program: Program, facts: Facts) -> PassResult:
        assert facts.context.task is not None
        return PassResult(masked(program), changed=True)


@pytest.fixture
def program() -> Program:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.data.abs_()  # so that every weight shows in the output
    return trace(model, torch.ones(1, 3))


@pytest.fixture
def task() -> Task:
    return Task(
        lambda model, batch: model(batch).sum(), [torch.ones(1, 3)], lambda _: 0.0, goal="min"
    )


def masked(program: Program) -> Program:
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[0, 0] = False
    return replace(program, masks=program.masks.cut_connections({"0.weight": keep}))


def with_weight(program: Program, weight: Tensor) -> Program:
    return replace(program, tensors={**program.tensors, "0.weight": nn.Parameter(weight)})


def with_outputs(program: Program, operation: Any, *args: Any) -> Program:
    """The program with an operation applied to its first output."""
    graph, _ = program.copy_graph()
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        changed = graph.call_function(operation, (output.args[0][0], *args))
    output.args = ((changed,),)
    return replace(program, graph=graph)


def test_passes_run_in_order_and_the_input_stays(program: Program) -> None:
    before = fingerprint(program)
    outcome = run_passes(program, [Cut(1), Cut(3), Cut(1)])
    assert outcome.program.masks.neurons.tolist() == [1, 3]
    assert outcome.refusals == (Refusal("0", "cut already"),)
    assert [r.changed for r in outcome.log] == [True, True, False]
    assert program.masks.empty
    assert fingerprint(program) == before


def test_no_passes_change_nothing(program: Program) -> None:
    outcome = run_passes(program, [])
    assert outcome.program is program
    assert outcome.refusals == ()
    assert outcome.log == ()


def test_each_pass_logs_one_line(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fxprune"):
        outcome = run_passes(
            program, [Cut(1)], measure=lambda p, _: {"parameters": 26 - 6 * len(p.masks.neurons)}
        )
    record = outcome.log[0]
    assert caplog.messages == [str(record)]
    assert str(replace(record, milliseconds=12.3)) == (
        "cut{neuron=1}: changed, parameters 26 -> 20, 12 ms"
    )


def test_log_counts_what_masks_cut(program: Program) -> None:
    outcome = run_passes(program, [Cut(1), Odd(lambda p: PassResult(masked(p), True))])
    assert [dict(r.after) for r in outcome.log] == [
        {"neurons cut": 1, "connections masked": 0},
        {"neurons cut": 1, "connections masked": 1},
    ]


def test_hook_sees_both_sides(program: Program) -> None:
    seen: list[tuple[str, int, int]] = []
    run_passes(
        program,
        [Cut(1), Cut(2)],
        hook=lambda p, before, result: seen.append(
            (str(p), len(before.masks.neurons), len(result.program.masks.neurons))
        ),
    )
    assert seen == [("cut{neuron=1}", 0, 1), ("cut{neuron=2}", 1, 2)]


def test_neurons_are_analysed_once_for_all_mask_passes(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Program] = []
    compute = NeuronAnalysis.compute

    def recorded(p: Program) -> Neurons:
        runs.append(p)
        return compute(p)

    monkeypatch.setattr(NeuronAnalysis, "compute", recorded)
    facts = Facts(program)
    run_passes(program, [Cut(1), Cut(2), Cut(3)], facts=facts)
    assert facts[NeuronAnalysis].count == 9
    assert len(runs) == 1


# Fingerprints -----------------------------------------------------------------------------------


def test_fingerprint_sees_masks_graph_and_tensors(program: Program) -> None:
    same = fingerprint(program)
    whole = torch.ones(4, 3, dtype=torch.bool)
    full = replace(program, masks=program.masks.cut_connections({"0.weight": whole}))
    assert fingerprint(full) == same
    changed = [
        fingerprint(masked(program)),
        fingerprint(replace(program, masks=program.masks.cut_neurons(torch.tensor([2])))),
        fingerprint(with_weight(program, torch.zeros(4, 3))),
        fingerprint(with_outputs(program, torch.ops.aten.relu.default)),
    ]
    assert len({same, *changed}) == 5


def test_fingerprint_sees_writes(program: Program) -> None:
    before = fingerprint(program)
    with torch.no_grad():
        program.tensors["0.weight"].mul_(2)
    assert fingerprint(program) != before


# Broken passes ----------------------------------------------------------------------------------


def _write(program: Program) -> PassResult:
    with torch.no_grad():
        program.tensors["0.weight"].zero_()
    return PassResult(program, False)


def _edit(program: Program) -> PassResult:
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        program.graph.get_attr("0.weight")
    return PassResult(program, True)


def _mask(name: str, mask: Tensor) -> Callable[[Program], PassResult]:
    return lambda p: PassResult(
        replace(p, masks=p.masks.cut_connections({name: mask})), changed=True
    )


def _refuse(program: Program) -> PassResult:
    raise PreconditionError("not on Sundays", pass_name="odd")


def _crash(program: Program) -> PassResult:
    raise KeyError("gone")


DEFECT = " This is a defect of the pass."
BROKEN: list[tuple[Callable[[Program], Any], type[FxpruneError], str]] = [
    (_refuse, PreconditionError, "not on Sundays"),
    (
        lambda p: p.masks,
        PostconditionError,
        "run must return a PassResult of a Program, not Masks(",
    ),
    (
        _write,
        PostconditionError,
        "it changed the program it was given instead of making a new one.",
    ),
    (_edit, PostconditionError, "it changed the program it was given instead of making a new one."),
    (
        lambda p: PassResult(p, True),
        PostconditionError,
        "it says that it changed the program, and that is not so." + DEFECT,
    ),
    (
        lambda p: PassResult(masked(p), False),
        PostconditionError,
        "it says that it left the program as it was, and that is not so." + DEFECT,
    ),
    (
        _mask("0.weight", torch.zeros(3, 4, dtype=torch.bool)),
        PostconditionError,
        "the mask of '0.weight' does not fit a tensor of that name." + DEFECT,
    ),
    (
        _mask("1.weight", torch.zeros(4, 3, dtype=torch.bool)),
        PostconditionError,
        "the mask of '1.weight' does not fit a tensor of that name." + DEFECT,
    ),
    (
        lambda p: PassResult(with_outputs(p, torch.ops.aten.unsqueeze.default, 0), True),
        PostconditionError,
        "the outputs have shapes [(1, 1, 2)] instead of [(1, 2)]." + DEFECT,
    ),
]


@pytest.mark.parametrize(("body", "kind", "message"), BROKEN)
def test_broken_pass_is_named_with_those_before(
    program: Program, body: Callable[[Program], Any], kind: type[FxpruneError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        run_passes(program, [Cut(1), Cut(2), Odd(body)])
    assert str(caught.value).startswith(f"pass 'odd' (after cut, cut): {message}")
    assert isinstance(caught.value, PassError)
    assert caught.value.pass_name == "odd"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Cut(1), "pass 'cut': it cut neurons that are protected." + DEFECT),
        (
            Odd(lambda p: PassResult(masked(p), True)),
            "pass 'odd': it masked connections of '0.weight', which is protected." + DEFECT,
        ),
    ],
)
def test_protection_is_enforced(program: Program, made: Pass, message: str) -> None:
    facts = Facts(program, Context(protect=("0.*",)))
    with pytest.raises(PostconditionError) as caught:
        run_passes(program, [made], facts=facts)
    assert str(caught.value) == message


def test_earlier_masks_of_protected_tensors_are_no_offence(program: Program) -> None:
    start = masked(program)
    facts = Facts(start, Context(protect=("0.bias", "2.*", "0.weight")))
    outcome = run_passes(start, [Odd(lambda p: PassResult(masked_again(p), True))], facts=facts)
    assert outcome.log[0].changed


def masked_again(program: Program) -> Program:
    tensors = {**program.tensors, "2.bias": nn.Parameter(torch.ones(2))}
    return replace(masked(program), tensors=tensors)


def test_wrong_pattern_is_told_without_any_pass(program: Program) -> None:
    with pytest.raises(ConfigError, match="protect pattern 'decoder' matches no parameter"):
        run_passes(program, [], facts=Facts(program, Context(protect=("decoder",))))


def test_crash_is_wrapped_with_its_cause(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        run_passes(program, [Odd(_crash)])
    assert str(caught.value) == "pass 'odd' stopped with KeyError: 'gone'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_graph_that_does_not_lint_is_refused(program: Program) -> None:
    def break_graph(p: Program) -> PassResult:
        graph, _ = p.copy_graph()
        first = next(n for n in graph.nodes if n.op == "call_function")
        first.args = (first, *first.args[1:])
        return PassResult(replace(p, graph=graph), True)

    with pytest.raises(
        PassError, match=r"^pass 'odd' stopped with RuntimeError: .*before it has been"
    ):
        run_passes(program, [Odd(break_graph)])


def test_exact_pass_must_keep_the_outputs(program: Program) -> None:
    weight = program.tensors["0.weight"].detach()
    same = run_passes(
        program, [OddExact(lambda p: PassResult(with_weight(p, weight.clone()), True))]
    )
    assert same.program.tensors["0.weight"] is not program.tensors["0.weight"]
    with pytest.raises(VerificationError) as caught:
        run_passes(program, [OddExact(lambda p: PassResult(with_weight(p, weight + 3), True))])
    assert caught.value.max_abs > 0.01
    assert str(caught.value).startswith("pass 'odd-exact': the outputs differ by ")


def test_exact_pass_is_compared_under_its_masks(program: Program) -> None:
    weight = program.tensors["0.weight"].detach().clone()
    weight[0, 0] = 0
    exact = OddExact(lambda p: PassResult(masked(with_weight(p, weight)), True))
    with pytest.raises(VerificationError):
        run_passes(program, [exact])
    assert run_passes(masked(program), [exact]).log[0].changed


def test_lossy_pass_may_rewrite_the_graph(program: Program) -> None:
    outcome = run_passes(
        program, [Odd(lambda p: PassResult(with_outputs(p, torch.ops.aten.relu.default), True))]
    )
    args, kwargs = program.example
    expected = torch.relu(program.module()(*args, **kwargs))
    assert torch.equal(outcome.program.module()(*args, **kwargs), expected)
    assert isinstance(outcome.program.graph, fx.Graph)


# Training ---------------------------------------------------------------------------------------


def test_training_pass_needs_a_task(program: Program, task: Task) -> None:
    with pytest.raises(PreconditionError) as caught:
        run_passes(program, [Cut(1), Trains()])
    assert str(caught.value) == (
        "pass 'trains' (after cut): it has to train, and there is no task. "
        "Give one: task=fxprune.Task(...), or on the command line a package.module:function "
        "that returns it after model and inputs."
    )
    assert run_passes(program, [Trains()], facts=Facts(program, Context(task=task))).log[0].changed


def test_fine_tuning_follows_each_pass_that_changed_masks(program: Program, task: Task) -> None:
    tuned: list[int] = []

    def fine_tune(p: Program) -> Program:
        tuned.append(len(p.masks.neurons))
        return with_weight(p, p.tensors["0.weight"].detach() + 1)

    facts = Facts(program, Context(task=task))
    outcome = run_passes(
        program, [Cut(1), Cut(1), Cut(2), Trains()], facts=facts, fine_tune=fine_tune
    )
    assert tuned == [1, 2]
    assert torch.allclose(outcome.program.tensors["0.weight"], program.tensors["0.weight"] + 2)


def test_fine_tuning_must_leave_masks_alone(program: Program) -> None:
    with pytest.raises(PostconditionError, match=r"^pass 'cut': fine-tuning after it changed the"):
        run_passes(program, [Cut(1)], fine_tune=masked)


def test_config_errors_keep_their_type(program: Program) -> None:
    def fail(_: Program) -> PassResult:
        raise ConfigError("no")

    with pytest.raises(ValueError, match=r"^pass 'odd': no$") as caught:
        run_passes(program, [Odd(fail)])
    assert type(caught.value) is ConfigError
