"""Stage-wise pruning: constraint, rounds, order, executors, bad input."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.contract import Context, Facts, NeuronAnalysis
from fxprune.errors import ConfigError, InputError, PassError, PreconditionError, TrainingError
from fxprune.masking.insertion import insert_masks
from fxprune.masking.masks import Masks
from fxprune.masking.prunable import find_prunable
from fxprune.masking.ratios import ratio_groups
from fxprune.passes._stage_wise_constraint import Constraint
from fxprune.passes.magnitude import Magnitude
from fxprune.passes.stage_wise import StageWise
from fxprune.pipeline import Outcome, run_passes
from fxprune.policy import as_policy, protected
from fxprune.program import Program
from fxprune.tracing.tracer import trace
from fxprune.training import Task, evaluate
from tests.zoo import by_name


class Net(nn.Module):
    """A GRU between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.rnn = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(self.stem(x))[0][:, -1])
        return y


X = torch.randn(48, 4, 3, generator=torch.Generator().manual_seed(5))
Y = (X.sum((1, 2)) > 0).long()


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def validate_with_large_products(model: nn.Module) -> float:
    large = torch.ones(1000, 1000)
    large @ large
    return validate(model)


def validate(model: nn.Module) -> float:
    return float(loss(model, (X, Y)))


def accuracy(model: nn.Module) -> float:
    return float((model(X).argmax(1) == Y).float().mean())


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def make_task(**options: Any) -> Task:
    chosen: dict[str, Any] = {"validate": validate, "goal": "min", "epochs": 4, **options}
    return Task(loss, [(X, Y)], optimizer=adam, **chosen)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    net = Net()
    optimizer = adam(net.parameters())
    for _ in range(25):
        optimizer.zero_grad()
        loss(net, (X, Y)).backward()
        optimizer.step()
    return trace(net.eval(), X)


def prune(
    program: Program, options: StageWise, task: Task | None = None, **context: Any
) -> Outcome:
    facts = Facts(program, Context(task or make_task(), **context))
    return run_passes(program, [options], facts=facts)


def stage_wise(**options: Any) -> StageWise:
    chosen: dict[str, Any] = {
        "tolerance": 0.3,
        "relative": True,
        "recovery": 0.1,
        "rounds": 2,
        "population": 4,
        "generations": 4,
        **options,
    }
    return StageWise(**chosen)


def metric_of(program: Program, task: Task | None = None) -> float:
    neurons = Facts(program)[NeuronAnalysis]
    return evaluate(insert_masks(program, neurons).module(), task or make_task())


def removed(program: Program) -> dict[str, float]:
    return {n: float((~m).double().mean()) for n, m in program.masks.connections.items()}


WEIGHTS = {"stem.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"}


# The result --------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["ncs", "random", "bisection"])
def test_the_result_is_sparse_and_within_the_recovery(program: Program, search: str) -> None:
    outcome = prune(program, stage_wise(search=search))
    assert removed(outcome.program).keys() == WEIGHTS
    assert sum(removed(outcome.program).values()) > 0.2
    assert metric_of(outcome.program) <= 1.1 * metric_of(program)
    (end,) = outcome.refusals
    assert end.node == "stage-wise, all classes"
    assert "ended after round" in end.reason


def test_a_goal_of_max_is_a_floor(program: Program) -> None:
    task = make_task(validate=accuracy, goal="max")
    outcome = prune(program, stage_wise(tolerance=0.1, recovery=0.1, relative=False), task)
    assert removed(outcome.program)
    assert metric_of(outcome.program, task) >= metric_of(program, task) - 0.1


def test_each_group_loses_its_lowest_and_exactly_as_many(program: Program) -> None:
    weights = {}

    def seen(model: nn.Module) -> float:
        weights.update({n: model.get_parameter(n).detach().clone() for n in WEIGHTS})
        return 0.0 if all(torch.equal(weights[n], program.tensors[n]) for n in WEIGHTS) else 0.5

    prune(program, stage_wise(tolerance=0, recovery=0, relative=False), make_task(validate=seen))
    for name, weight in weights.items():
        full = program.tensors[name].detach()
        cut = weight == 0
        assert 0 < int(cut.sum()) < cut.numel(), name
        assert torch.equal(weight[~cut], full[~cut])
        assert full[cut].abs().max() < full[~cut].abs().min()


def test_a_search_sees_what_retraining_starts_from(program: Program) -> None:
    """The buffer of a candidate computes what its masked program does."""
    metrics: list[float] = []

    def record(model: nn.Module) -> float:
        metrics.append(validate(model))
        return metrics[-1]

    options = stage_wise(rounds=1, population=1, generations=6, search="bisection", recovery=0.3)
    outcome = prune(program, options, make_task(validate=record, epochs=0))
    dense, *tried, start = metrics
    assert outcome.program.masks.same_as(Masks()) is False
    assert max(m for m in tried if m <= 1.3 * dense) == start


def test_later_rounds_only_add_masks(program: Program) -> None:
    one = prune(program, stage_wise(rounds=1)).program.masks.connections
    two = prune(program, stage_wise(rounds=2)).program.masks.connections
    assert all(bool((one[n] | ~two[n]).all()) for n in one)
    assert any(not torch.equal(one[n], two[n]) for n in one)


def test_the_program_given_and_the_random_state_stay_as_they_were(program: Program) -> None:
    before = {n: t.detach().clone() for n, t in program.tensors.items()}
    state = torch.get_rng_state()
    prune(program, stage_wise())
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_result(program: Program) -> None:
    one, two, other = (prune(program, stage_wise(), make_task(seed=s)).program for s in (1, 1, 2))
    assert one.masks.same_as(two.masks)
    assert all(torch.equal(one.tensors[n], two.tensors[n]) for n in one.tensors)
    assert not one.masks.same_as(other.masks)


def test_compile_shrinks_and_verifies(program: Program) -> None:
    compact = fxprune.compile(program, stage_wise(rounds=1), task=make_task())
    assert compact.report.sparsity > 0.05
    assert {str(k) for k in compact.report.by_class} == {"feedforward", "input", "recurrent"}


# Nothing that is good enough ---------------------------------------------------------------------


def test_a_tolerance_never_met_returns_the_unpruned_model(program: Program) -> None:
    full = {n: t.detach().clone() for n, t in program.tensors.items()}

    def same(model: nn.Module) -> float:
        return float(all(torch.equal(p, full[n]) for n, p in model.named_parameters()))

    outcome = prune(program, stage_wise(tolerance=0.5), make_task(validate=same, goal="max"))
    assert outcome.program is program
    end, nothing = outcome.refusals
    assert "no candidate that removes more is within the tolerance" in end.reason
    assert nothing.reason == "nothing was pruned: no round recovered"


def test_a_model_that_does_not_recover_is_not_the_result(program: Program) -> None:
    hopeless = make_task(epochs=0)
    outcome = prune(program, stage_wise(recovery=0, search="bisection"), hopeless)
    assert outcome.program is program
    assert "did not recover" in outcome.refusals[0].reason
    assert "where at most 0." in outcome.refusals[0].reason


def test_the_last_recovered_round_is_kept_with_its_best_epoch(program: Program) -> None:
    calls = {"fits": 0}

    def worse_in_round_two(model: nn.Module, batch: Any) -> Tensor:
        calls["fits"] += 1
        return loss(model, batch) * (1 if calls["fits"] <= 4 else -50)

    first = prune(program, stage_wise(rounds=1, search="bisection"))
    task = Task(worse_in_round_two, [(X, Y)], validate, "min", optimizer=adam, epochs=4)
    options = stage_wise(rounds=3, search="bisection", recovery=0.0, retries=0)
    both = prune(program, options, task)
    assert calls["fits"] > 4
    assert "did not recover" in both.refusals[0].reason
    assert "ended after round 2" in both.refusals[0].reason
    assert both.program.masks.same_as(first.program.masks)
    assert all(torch.equal(both.program.tensors[n], t) for n, t in first.program.tensors.items())


@pytest.mark.parametrize("broken", [2, 1])
def test_retraining_that_breaks_down_is_a_setback_once_a_round_recovered(
    program: Program, broken: int
) -> None:
    steps = 0

    def diverges(model: nn.Module, batch: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return loss(model, batch) * (1 if steps <= 4 * (broken - 1) else math.nan)

    task = Task(diverges, [(X, Y)], validate, "min", optimizer=adam, epochs=4)
    options = stage_wise(search="bisection", retries=0)
    if broken == 1:
        with pytest.raises(TrainingError, match="the loss is nan"):
            prune(program, options, task)
        return
    first = prune(program, replace(options, rounds=1))
    both = prune(program, options, task)
    assert both.program.masks.same_as(first.program.masks)
    assert all(torch.equal(both.program.tensors[n], t) for n, t in first.program.tensors.items())
    assert "removed retraining failed: " in both.refusals[0].reason
    assert "the loss is nan" in both.refusals[0].reason


def test_after_a_setback_the_search_goes_half_as_far(program: Program) -> None:
    found: list[float] = []

    def record(model: nn.Module) -> float:
        found.append(validate(model))
        return found[-1]

    def tried(retries: int) -> list[float]:
        """The metric that each retraining starts from, in multiples of the dense one."""
        found.clear()
        options = stage_wise(
            rounds=4, population=1, generations=12, search="bisection", recovery=0, retries=retries
        )
        outcome = prune(program, options, make_task(validate=record, epochs=0))
        assert outcome.program is program
        assert "did not recover" in outcome.refusals[0].reason
        assert f"ended after round {retries + 1}," in outcome.refusals[0].reason
        return [metric / found[0] for metric in found[13::13]]

    assert len(tried(0)) == 1
    (first, second, third) = tried(2)
    assert 1.15 < first <= 1.3
    assert 1.075 < second <= 1.15
    assert 1 < third <= 1.075


def test_a_round_that_failed_is_tried_again_with_less(program: Program) -> None:
    fits = {"steps": 0}

    def fails_at_first(model: nn.Module, batch: Any) -> Tensor:
        fits["steps"] += 1
        return loss(model, batch) * (1 if fits["steps"] > 4 else -50)

    task = Task(fails_at_first, [(X, Y)], validate, "min", optimizer=adam, epochs=4)
    options = stage_wise(search="bisection", recovery=0.0)
    outcome = prune(program, options, task)
    whole = prune(program, replace(options, rounds=1))
    assert "ended after round 2" in outcome.refusals[0].reason
    cut, more = (sum(removed(o.program).values()) for o in (outcome, whole))
    assert 0 < cut < more
    assert metric_of(outcome.program) <= metric_of(program)


def test_a_limit_may_be_reached_and_rounding_does_not_count() -> None:
    """0.8 - 0.7 is more than 0.1 in floating point, and 0.4 - 0.3 less than 0.1."""
    for dense, metric in ((0.8, 0.7), (0.4, 0.3), (-0.3, -0.4), (95.1, 95.0)):
        floor = Constraint(dense, "max", 0.1, relative=False)
        assert floor.fitness(0.5, metric) == -0.5
        assert floor.fitness(0.5, metric - 1e-6) > 1
        ceiling = Constraint(metric, "min", 0.1, relative=False)
        assert ceiling.fitness(0.5, dense) == -0.5
        assert ceiling.fitness(0.5, dense + 1e-6) > 1
    assert Constraint(1e9, "min", 0.5, relative=False).fitness(0.5, 1e9 + 0.6) > 1


def test_the_only_round_that_finds_nothing_says_so(program: Program) -> None:
    outcome = prune(program, stage_wise(tolerance=0, recovery=0, rounds=1, search="random"))
    assert outcome.program is program
    assert outcome.refusals[0].reason.endswith(
        "one round is done; no candidate that removes more is within the tolerance"
    )


@pytest.mark.parametrize("most", [5e-5, 5e-4])
def test_a_range_below_the_resolution_of_bisection(program: Program, most: float) -> None:
    """That of the largest ratio, or of what is left of it after a search that found nothing."""
    worse = iter([1.0, *[2.0] * 100])
    task = make_task(validate=lambda _: next(worse))
    outcome = prune(program, stage_wise(search="bisection", most=most, rounds=5), task)
    assert outcome.program is program
    assert "no candidate that removes more is within the tolerance" in outcome.refusals[0].reason


def test_cma_leaves_a_single_ratio_to_bisection(program: Program) -> None:
    one = stage_wise(search="cma", grouping="one", rounds=1)
    same = prune(program, replace(one, search="bisection")).program
    found = prune(program, one).program
    assert sum(removed(found).values()) > 0.1
    assert removed(found) == removed(same)


def test_where_no_more_may_go_nothing_is_evaluated(program: Program) -> None:
    calls: list[float] = []

    def record(model: nn.Module) -> float:
        calls.append(validate(model))
        return calls[-1]

    outcome = prune(program, stage_wise(most=0.0), make_task(validate=record))
    assert outcome.program is program
    assert len(calls) == 1


# Groups ------------------------------------------------------------------------------------------


def groups_of(model: str | Program, grouping: Any = "class") -> dict[str, tuple[str, list[str]]]:
    if isinstance(model, str):
        known = by_name(model)
        model = trace(known.build(), known.inputs(known.batch, known.time))
    neurons = Facts(model)[NeuronAnalysis]
    found = find_prunable(model, neurons, protected(model, neurons, ()))
    groups = ratio_groups(found, ("feedforward", "input", "recurrent"), grouping)
    return {g.name: (str(g.connection_class), [w.name for w in g.weights]) for g in groups}


def test_groups_are_classes_and_feedforward_layers(program: Program) -> None:
    assert groups_of(program) == {
        "feedforward stem": ("feedforward", ["stem.weight"]),
        "feedforward head": ("feedforward", ["head.weight"]),
        "input": ("input", ["rnn.weight_ih_l0"]),
        "recurrent": ("recurrent", ["rnn.weight_hh_l0"]),
    }
    assert groups_of(program, "layer") == {
        "stem": ("feedforward", ["stem.weight"]),
        "head": ("feedforward", ["head.weight"]),
        "rnn.weight_ih_l0": ("recurrent", ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
    }
    assert list(groups_of(program, "one")) == ["all"]
    assert set(groups_of(program, "one")["all"][1]) == WEIGHTS


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize("grouping", ["class", "layer", "one"])
def test_a_tied_tensor_is_in_one_group(grouping: str) -> None:
    groups = groups_of("tied-projected-lm", grouping)
    members = [name for _, names in groups.values() for name in names]
    assert len(members) == len(set(members)) == 4
    assert "decoder.weight" not in members


def test_a_tensor_of_two_classes_is_of_the_cautious_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(4, 4, bias=False)
            self.head = nn.Linear(4, 4, bias=False)
            self.head.register_parameter("weight", self.rnn.get_parameter("weight_ih_l0"))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(x)[0])
            return y

    name = "rnn.weight_ih_l0"
    found = groups_of(trace(Tied(), torch.zeros(3, 2, 4)))
    assert {names[0]: kind for kind, names in found.values()}[name] == "input"
    assert [names for _, names in found.values()].count([name]) == 1


def test_classes_limit_what_is_pruned_and_protection_holds(program: Program) -> None:
    outcome = prune(program, stage_wise(classes=("recurrent", "feedforward")), protect=("head.*",))
    assert removed(outcome.program).keys() == {"stem.weight", "rnn.weight_hh_l0"}


def test_earlier_masks_stay_and_are_not_counted(program: Program) -> None:
    half = run_passes(program, [Magnitude(0.5, structure="connection")]).program
    task = make_task()
    both = prune(half, stage_wise(search="bisection", rounds=1), task).program
    for name, mask in half.masks.connections.items():
        assert not bool((both.masks.connections[name] & ~mask).any())
    neurons = Facts(half)[NeuronAnalysis]
    found = find_prunable(half, neurons, protected(half, neurons, ()))
    sizes = {g.name: g.size for g in ratio_groups(found, ("recurrent",))}
    assert sizes == {"recurrent": int(half.masks.connections["rnn.weight_hh_l0"].sum())}


def test_nothing_to_prune_is_said(program: Program) -> None:
    outcome = prune(program, stage_wise(), protect=("*",))
    assert outcome.program is program
    assert "no connections of the classes" in outcome.refusals[-1].reason


# Sequential --------------------------------------------------------------------------------------


def test_sequential_goes_class_by_class_in_the_order_given(
    program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    order = ("recurrent", "feedforward", "input")
    options = stage_wise(order="sequential", classes=order, rounds=1, search="bisection")
    with caplog.at_level("INFO", logger="fxprune"):
        outcome = prune(program, options)
    assert [r.node for r in outcome.refusals] == [f"stage-wise, {name}" for name in order]
    first = next(m for m in caplog.messages if "stage-1-round-1" in m)
    assert "feedforward stem 0.00%, feedforward head 0.00%, input 0.00%" in first
    assert "recurrent 0.00%" not in first
    assert removed(outcome.program).keys() == WEIGHTS
    assert metric_of(outcome.program) <= 1.1 * metric_of(program)


# Executors ---------------------------------------------------------------------------------------


@pytest.fixture(params=["threads", "processes"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made: Executor
    if request.param == "threads":
        made = ThreadPoolExecutor(3)
    else:
        made = ProcessPoolExecutor(1, mp_context=get_context("fork"))
    with made:
        yield made


def test_executors_change_nothing(program: Program, executor: Executor, tmp_path: Path) -> None:
    task = make_task(checkpoint=tmp_path)
    alone = prune(program, stage_wise(), task)
    (rounds,) = tmp_path.iterdir()
    rounds.unlink()
    (tmp_path / rounds.name.replace("-rounds.pt", "-workers-killed")).mkdir()
    spread = prune(program, stage_wise(executor=executor), task)
    assert spread.program.masks.same_as(alone.program.masks)
    for name, tensor in alone.program.tensors.items():
        assert torch.equal(spread.program.tensors[name], tensor)
    assert spread.refusals == alone.refusals
    assert all(p.name.endswith("-rounds.pt") for p in tmp_path.iterdir())


def test_a_forked_process_does_not_wait_for_threads_of_its_parent(program: Program) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.randn(1000, 1000)
        large @ large  # from now on this process has threads, which a fork does not
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as processes:
            options = stage_wise(executor=processes)
            outcome = prune(program, options, make_task(validate=validate_with_large_products))
    finally:
        torch.set_num_threads(threads)
    assert removed(outcome.program)
    assert not any("executor" in str(r) for r in outcome.refusals)


def test_threads_have_a_buffer_each_and_no_more(program: Program) -> None:
    both = threading.Barrier(2, timeout=20)
    calls, models = itertools.count(), set()

    def meet(model: nn.Module) -> float:
        if threading.current_thread() is not threading.main_thread():  # main retrains
            models.add(id(model))
            if next(calls) in (1, 2):  # 0 is the unpruned model, which comes alone
                both.wait()
        return validate(model)

    with ThreadPoolExecutor(2) as threads:
        outcome = prune(program, stage_wise(executor=threads), make_task(validate=meet, epochs=0))
    assert len(models) == 2
    alone = prune(program, stage_wise(), make_task(epochs=0))
    assert outcome.program.masks.same_as(alone.program.masks)


def test_what_cannot_be_pickled_is_refused_before_the_search(program: Program) -> None:
    calls: list[int] = []

    def local(model: nn.Module) -> float:
        calls.append(1)
        return validate(model)

    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as processes:
        options = stage_wise(executor=processes)
        with pytest.raises(PreconditionError, match=r"validate cannot be sent .*top of a module"):
            prune(program, options, make_task(validate=local))
    assert not calls


class Dying(Executor):
    """Runs some things at once, and then dies."""

    lives = 7

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.lives -= 1
        if self.lives < 0:
            future.set_exception(BrokenProcessPool("gone"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_an_executor_that_dies_leaves_the_search_to_this_process(program: Program) -> None:
    alone = prune(program, stage_wise())
    outcome = prune(program, stage_wise(executor=Dying()))
    assert outcome.program.masks.same_as(alone.program.masks)
    assert outcome.refusals[-1].node == "stage-wise, executor"
    assert "went on in process: BrokenProcessPool: gone" in outcome.refusals[-1].reason


def test_an_executor_has_no_text_form() -> None:
    with ThreadPoolExecutor(1) as threads:
        options = stage_wise(executor=threads)
        assert str(options) == str(stage_wise())
        assert options == stage_wise()
        table = {"stage-wise": StageWise}
        assert as_policy(str(options), table).passes == (stage_wise(),)
    with pytest.raises(ConfigError, match=r"'executor' .* given in Python, not 'threads'"):
        as_policy("stage-wise{tolerance=0.1,executor=threads}", table)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "'tolerance' .* at least 0, not -0.1"),
        ({"tolerance": math.nan}, "'tolerance'"),
        ({"retries": -1}, "'retries' .* at least 0, not -1"),
        ({"recovery": 0.5}, "'recovery' .* at most the tolerance 0.3, not 0.5"),
        ({"classes": ("input", "outputs")}, "'classes' .* feedforward, input, recurrent"),
        ({"classes": ()}, "'classes'"),
        ({"classes": "input"}, "'classes'"),
        ({"classes": 5}, "'classes' .* must list some of .* not 5"),
        ({"classes": None}, "'classes' .* must list some of .* not None"),
        ({"classes": [["input"]]}, "'classes' .* must list some of"),
        ({"classes": ("input", "input")}, "'classes' .* each once"),
        ({"order": "parallel"}, "'order' .* joint, sequential"),
        ({"order": "sequential", "grouping": "layer"}, "'grouping' .* must be class"),
        ({"rounds": 0}, "'rounds' .* integer, at least 1"),
        ({"generations": 2.5}, "'generations' .* integer"),
        ({"search": "cma", "population": 3}, "'population' .* at least 4"),
        ({"search": "grid"}, "'search'"),
        ({"search": "random", "step": 0.5}, "'step' .* has no effect with search=random: leave"),
        ({"most": 1.0}, "'most'"),
        ({"relative": 1}, "'relative'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_wise(**options)


def test_no_task(program: Program) -> None:
    with pytest.raises(PreconditionError, match="there is no task"):
        run_passes(program, [stage_wise()])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda model: math.nan, TrainingError, "returned nan for the unpruned model"),
        (lambda model: math.inf, TrainingError, "inf for the unpruned model"),
        (lambda model: sum([]) / len([]), PassError, "ZeroDivisionError"),
    ],
)
def test_a_metric_that_is_none(
    program: Program, bad: Callable[[nn.Module], float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prune(program, stage_wise(), make_task(validate=bad))


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_candidate_whose_metric_breaks_is_only_bad(program: Program, broken: float) -> None:
    def perplexity(model: nn.Module) -> float:
        cut = sum(int((p == 0).sum()) for p in model.parameters())
        return broken if cut > 60 else validate(model)

    outcome = prune(program, stage_wise(rounds=1), make_task(validate=perplexity))
    assert 0 < sum(int((~m).sum()) for m in outcome.program.masks.connections.values()) <= 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda:99"}, "'cuda:99' cannot be used"),
        ({"optimizer": torch.optim.LBFGS}, "made a LBFGS"),
    ],
)
def test_what_cannot_train_is_told_before_the_search(
    program: Program, change: dict[str, Any], message: str
) -> None:
    def never(model: nn.Module) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(ConfigError, match=message):
        prune(program, stage_wise(), replace(make_task(validate=never), **change))


def test_a_model_without_a_train_mode_is_refused_before_the_search() -> None:
    class Halved(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if self.training else x / 2)

    def never(model: nn.Module) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(InputError, match=r"pass 'stage-wise': this model computes something else"):
        prune(trace(Halved(), X), stage_wise(), make_task(validate=never))


def test_cma_without_its_package(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(ConfigError, match=r"fxprune\[search\]"):
        prune(program, stage_wise(search="cma"))


def test_constant_weights_lose_no_more_than_asked(program: Program) -> None:
    tensors = {
        n: nn.Parameter(torch.full_like(t, 0.1)) if n in WEIGHTS else t
        for n, t in program.tensors.items()
    }
    flat = replace(program, tensors=tensors)
    cut: list[int] = []

    def count(model: nn.Module) -> float:
        cut.append(int((model.get_parameter("rnn.weight_hh_l0") == 0).sum()))
        return 0.0

    options = stage_wise(search="bisection", population=1, generations=1, rounds=1, grouping="one")
    prune(flat, replace(options, most=0.5, tolerance=1.0), make_task(validate=count, epochs=0))
    total = sum(t.numel() for n, t in tensors.items() if n in WEIGHTS)
    assert cut[0] == 0
    assert 0 < cut[1] <= total // 2
