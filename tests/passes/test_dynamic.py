"""Dynamic pruning: masks follow the dense weights, and what was removed comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fxprune
from fxprune.analysis import analyze
from fxprune.contract import Context, Facts, Pass
from fxprune.errors import ConfigError, PreconditionError
from fxprune.masking.insertion import insert_masks
from fxprune.masking.structures import STRUCTURES
from fxprune.passes import DynamicPruning, Magnitude
from fxprune.passes._dynamic_masks import FollowingMasks, Regrowth
from fxprune.pipeline import Outcome, run_passes
from fxprune.policy import as_policy
from fxprune.program import Program, Refusal
from fxprune.tracing.tracer import trace
from fxprune.training import Task
from tests.laws import assert_same, at_precision
from tests.passes import tagging
from tests.passes.tagging import BATCHES, WEIGHTS, check_that_it_continues, mse, tagger
from tests.zoo import by_name

STEPS = 12
MIXTURES = ("connection+filter", "row+neuron", "kernel+channel+depth")
TRAINED = [  # all structures where there are most to tell apart, the mixtures everywhere
    (model, structure)
    for model, structures in {
        "bigru-two-layer": (*STRUCTURES, *MIXTURES),
        "residual-cnn": (*STRUCTURES, *MIXTURES),
        "lstm-two-layer": MIXTURES,
        "lstm-projected-two-layer": MIXTURES,
        "packed-bilstm-two-layer": MIXTURES,
        "lstm-cell-loop": MIXTURES,
        "tied-character-model": MIXTURES,
        "residual-lstms": MIXTURES,
    }.items()
    for structure in structures
]


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.01)


def make_task(**options: Any) -> Task:
    return tagging.make_task(**({"optimizer": momentum} | options))


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(tagger(), BATCHES[0])


def attached(
    program: Program, pass_: DynamicPruning, steps: int = STEPS, protect: tuple[str, ...] = ()
) -> FollowingMasks:
    learning = pass_.attach(program, Facts(program, Context(protect=protect)), steps)
    assert isinstance(learning, FollowingMasks)
    return learning


def prune(program: Program, pass_: Pass, **options: Any) -> Outcome:
    protect = options.pop("protect", ())
    return run_passes(
        program, [pass_], facts=Facts(program, Context(make_task(**options), protect))
    )


def some_loss(outputs: Any) -> Tensor:
    values = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    return torch.stack([x.square().mean() for x in values if x.is_floating_point()]).sum()


def train(learning: FollowingMasks, inputs: Any, steps: int, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.Adam(learning.module.parameters(), lr=0.01)
    learning.module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        some_loss(learning.module(*inputs)).backward()
        optimizer.step()
        learning.step()
    learning.module.eval()
    return optimizer


# The result is what was trained -------------------------------------------------------------------


@cache
def traced(name: str) -> tuple[Program, Any]:
    """A model of the zoo in float64, and an input."""
    torch.manual_seed(0)
    model = by_name(name)
    inputs = at_precision(model.inputs(model.batch, model.time), torch.float64)
    return trace(model.build().double(), inputs), inputs


@pytest.mark.parametrize(("model", "structure"), TRAINED)
def test_hardened_is_what_was_evaluated(model: str, structure: str) -> None:
    program, inputs = traced(model)
    learning = attached(program, DynamicPruning(0.5, structure, every=2))
    train(learning, inputs, STEPS)
    assert learning.finished
    hard = learning.harden()
    assert hard.masks.empty == all(r.removed == 0 for r in learning.regrown.values())
    masked = insert_masks(hard, analyze(hard)).module()
    assert_same(learning.module, masked, inputs, 1e-12)
    assert_same(masked, fxprune.compile(hard, (), progress=False).module, inputs, 1e-12)


def test_dense_weights_are_kept_and_those_masked_are_baked(program: Program) -> None:
    learning = attached(program, DynamicPruning(0.5, every=2))
    train(learning, (BATCHES[0],), STEPS)
    dense = learning.module.state_dict()
    hard = learning.harden()
    for name, keep in hard.masks.connections.items():
        assert bool((dense[name] != 0).all())
        assert torch.equal(hard.tensors[name], dense[name] * keep)
        assert isinstance(hard.tensors[name], nn.Parameter)
    assert torch.equal(hard.tensors["head.bias"], dense["head.bias"])


def test_neurons_that_go_take_their_biases_along() -> None:
    compact = fxprune.compile(
        tagger(), DynamicPruning(0.5, "filter"), example_inputs=BATCHES[0], task=make_task()
    )
    shapes = {name: tuple(p.shape) for name, p in compact.module.named_parameters()}
    assert shapes["stem.weight"] == (3, 4)
    assert shapes["stem.bias"] == (3,)
    assert shapes["rnn.weight_ih_l0"] == (9, 3)  # 3 of 5 units, in all three gates
    assert shapes["head.weight"] == (2, 3)


class Residual(nn.Module):
    """A branch that batch norm ends, or not."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 4)
        self.norm: nn.Module = nn.BatchNorm1d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.b(torch.relu(self.a(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", [False, True])
def test_a_branch_that_goes_leaves_the_shortcut_and_learns(norm: bool) -> None:
    torch.manual_seed(0)
    model, x = Residual(norm), torch.randn(6, 4)
    learning = attached(trace(model, x), DynamicPruning(0.5, "depth", every=1))
    with torch.no_grad():
        assert torch.equal(learning.harden().module()(x), model.eval()(x))  # 0.5 of one is none
        learning._tallied()[0][1].keep.fill_(False)
        learning._apply()
    assert torch.equal(learning.module(x), x)
    hard = learning.harden()
    assert torch.equal(insert_masks(hard, analyze(hard)).module()(x), x)
    learning.module.train()
    (learning.module(x) ** 3).sum().backward()
    output = model.train()(x)
    output.backward(3 * x**2)  # as if the branch were there, of the loss without it
    for name, parameter in model.named_parameters():
        found = learning.module.get_parameter(name).grad
        assert parameter.grad is not None and found is not None
        assert torch.allclose(found, parameter.grad, atol=1e-5), name


# Gradients ----------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two linear maps with a ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


def chain(structure: str, regrow: bool = True) -> tuple[FollowingMasks, Tensor]:
    """A chain whose neuron 0 is the lowest, under a final-sized mask, and an input."""
    torch.manual_seed(0)
    model = Chain()
    with torch.no_grad():
        model.a.weight.copy_(torch.rand(4, 3) + 0.5)
        model.b.weight.copy_(torch.rand(2, 4) + 0.5)
        if structure != "connection":
            model.a.weight[0] *= 0.1
            model.b.weight[:, 0] *= 0.1
    x = torch.rand(5, 3)
    program = trace(model, x)
    options = DynamicPruning(0.25, structure, ramp=0.0, every=1, regrow=regrow)
    return attached(program, options), x


def gradients(learning: FollowingMasks, x: Tensor) -> tuple[Tensor, Tensor]:
    learning.module.zero_grad()
    learning.module(x).sum().backward()
    a, b = (learning.module.get_parameter(f"{n}.weight").grad for n in "ab")
    assert a is not None and b is not None
    return a, b


def test_connections_get_the_dense_gradient_straight_through() -> None:
    learning, x = chain("connection")
    a, b = (learning.module.get_parameter(f"{n}.weight").detach() for n in "ab")
    masks = learning.harden().masks.connections
    masked = a * masks["a.weight"], b * masks["b.weight"]
    hidden = x @ masked[0].T
    error = torch.ones(5, 2)
    active = (hidden > 0).float()
    # Of all entries: there is no mask at the end.
    by_hand = (((error @ masked[1]) * active).T @ x, error.T @ torch.relu(hidden))
    for found, expected in zip(gradients(learning, x), by_hand, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    for expected, name in zip(by_hand, ("a.weight", "b.weight"), strict=True):
        assert bool((expected[~masks[name]] != 0).all())


def test_without_regrowth_what_is_out_gets_no_gradient() -> None:
    learning, x = chain("connection", regrow=False)
    masks = learning.harden().masks.connections
    for found, name in zip(gradients(learning, x), ("a.weight", "b.weight"), strict=True):
        assert torch.equal(found != 0, masks[name])


@pytest.mark.parametrize(
    "model",
    ["lenet", "residual-cnn", "lstm-two-layer", "bigru-two-layer", "manual-gru", "conv-lstm"],
)
def test_what_goes_straight_through_goes_no_further(model: str) -> None:
    """Gradients of whatever is not at a dropped filter are those of the model without it."""
    program, inputs = traced(model)
    learning = attached(program, DynamicPruning(0.5, "filter", every=1, ramp=0.0))
    hard = learning.harden()
    neurons = analyze(program)
    masked = insert_masks(hard, analyze(hard)).module()
    for module in (learning.module, masked):
        torch.manual_seed(1)
        outputs = pytree.tree_leaves(module.eval()(*inputs))
        sum((y**2).sum() for y in outputs).backward()
    dropped = torch.zeros(neurons.count, dtype=torch.bool)
    dropped[hard.masks.neurons] = True
    arrived = 0
    for name, expected in masked.named_parameters():
        found = learning.module.get_parameter(name).grad
        near = torch.zeros(expected.shape, dtype=torch.bool)
        for axis in neurons.owned.get(name, ()):
            near |= dropped[axis.clamp(min=0)] & (axis >= 0)
        if found is None or expected.grad is None:
            assert found is None and expected.grad is None
            continue
        torch.testing.assert_close(found[~near], expected.grad[~near], rtol=1e-9, atol=1e-12)
        arrived += int((found[near] != 0).sum())
    assert arrived  # those that are out learn


@pytest.mark.parametrize("structure", ["filter", "channel", "neuron"])
def test_gradients_reach_the_end_that_neurons_are_judged_by(structure: str) -> None:
    learning, x = chain(structure)
    assert torch.allclose(learning.module(x), dropped(learning, x), atol=1e-6)
    a, b = (learning.module.get_parameter(f"{n}.weight").detach() for n in "ab")
    found = gradients(learning, x)
    entering = b[:, 0].sum() * x.sum(0)  # as if neuron 0, which is active, were there
    leaving = (x @ a[0]).sum().expand(2)
    if structure == "filter":
        assert torch.allclose(found[0][0], entering, atol=1e-6)
        assert not bool(found[1][:, 0].any())
    else:
        assert not bool(found[0][0].any())
        assert torch.allclose(found[1][:, 0], leaving, atol=1e-6)
    # Without regrowth neither end gets any.
    for gradient in gradients(chain(structure, regrow=False)[0], x):
        assert not bool((gradient[0] if gradient.shape[0] == 4 else gradient[:, 0]).any())


def dropped(learning: FollowingMasks, x: Tensor) -> Tensor:
    a, b = (learning.module.get_parameter(f"{n}.weight").detach() for n in "ab")
    return torch.relu(x @ a[1:].T) @ b[:, 1:].T


@pytest.mark.parametrize("structure", ["row", "connection"])
def test_constants_before_a_batch_norm_let_nothing_through(structure: str) -> None:
    """Its gradient is that of the output over the deviation, which is 0."""
    torch.manual_seed(0)
    first_layer = nn.Linear(3, 4)
    with torch.no_grad():
        first_layer.weight[1] *= 0.01
    model = nn.Sequential(first_layer, nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x = torch.randn(8, 3)
    learning = attached(trace(model, x), DynamicPruning(0.3, structure, ramp=0.0))
    assert not bool(learning.harden().masks.connections["0.weight"][1].any())
    learning.module.train()
    learning.module(x).square().sum().backward()
    first, last = (learning.module.get_parameter(f"{n}.weight").grad for n in "03")
    assert first is not None and last is not None
    assert not bool(first[1].any())
    assert bool(first[[0, 2, 3]].any(1).all())
    assert bool(last.all())  # no batch norm follows


def test_final_masks_let_nothing_through() -> None:
    for structure in ("connection", "filter", "neuron"):
        learning, x = chain(structure)
        for _ in range(9):
            learning.step()
        assert learning.finished
        a, b = gradients(learning, x)
        hard = learning.harden()
        if structure == "connection":
            assert not bool(a[~hard.masks.connections["a.weight"]].any())
        else:
            assert not bool(a[0].any())
            assert not bool(b[:, 0].any())


# Schedule -----------------------------------------------------------------------------------------


def zeros(learning: FollowingMasks) -> dict[str, int]:
    masks = learning.harden().masks.connections
    return {n: int((~masks[n]).sum()) if n in masks else 0 for n in WEIGHTS}


def test_sparsity_follows_the_ramp(program: Program) -> None:
    options = DynamicPruning(0.8, start=0.25, ramp=0.5, end=0.75, every=2)
    learning = attached(program, options, steps=16)
    for step in range(17):
        last = min(12, step // 2 * 2)
        reached = 1 - (1 - (last - 4) / 8) ** 3 if step >= 4 else 0.0
        assert zeros(learning) == {
            n: math.floor(0.8 * reached * s + 1e-9) for n, s in WEIGHTS.items()
        }
        train(learning, (BATCHES[0],), 1)


def test_masks_do_not_change_after_the_end(program: Program) -> None:
    learning = attached(program, DynamicPruning(0.5, every=1, end=0.5))
    train(learning, (BATCHES[0],), 6)
    assert learning.finished
    final = learning.harden().masks
    train(learning, (BATCHES[0],), 6)
    assert learning.harden().masks.same_as(final)


def test_no_ramp_begins_at_full_sparsity(program: Program) -> None:
    learning = attached(program, DynamicPruning(0.5, ramp=0.0))
    assert zeros(learning) == {n: s // 2 for n, s in WEIGHTS.items()}


# Coming back --------------------------------------------------------------------------------------


def raised(learning: FollowingMasks, steps: int) -> Regrowth:
    """Makes the two lowest of the head the highest, then steps."""
    head = learning.module.get_parameter("head.weight")
    with torch.no_grad():
        lowest = head.abs().flatten().argsort()[:2]
        head.view(-1)[lowest] = 10.0
    for _ in range(steps):
        learning.step()
    return learning.regrown["connection"]


def test_what_was_removed_comes_back_and_is_counted(program: Program) -> None:
    learning = attached(program, DynamicPruning(0.5, ramp=0.0, every=2), protect=())
    assert learning.regrown == {"connection": Regrowth(0, 0, sum(s // 2 for s in WEIGHTS.values()))}
    assert raised(learning, 1) == learning.regrown["connection"]
    assert learning.regrown["connection"].returns == 0  # not yet time
    assert raised(learning, 1).returns == 4  # two at the call above, two more here
    assert learning.regrown["connection"].survivors == 4
    hard = learning.harden()
    assert int((hard.tensors["head.weight"] == 10.0).sum()) == 4


def test_without_regrowth_it_stays_out(program: Program) -> None:
    learning = attached(program, DynamicPruning(0.5, ramp=0.0, every=1, regrow=False))
    before = learning.harden().masks
    assert raised(learning, 3) == Regrowth(0, 0, sum(s // 2 for s in WEIGHTS.values()))
    assert learning.harden().masks.same_as(before)


def test_without_regrowth_an_exact_zero_does_not_change_places(program: Program) -> None:
    learning = attached(program, DynamicPruning(0.5, ramp=0.0, every=1, regrow=False))
    with torch.no_grad():
        learning.module.get_parameter("head.weight").zero_()
    before = learning.harden().masks
    learning.step()
    assert learning.harden().masks.same_as(before)


def test_hysteresis_favours_what_is_in(program: Program) -> None:
    def returns(hysteresis: float) -> int:
        learning = attached(program, DynamicPruning(0.5, ramp=0.0, every=1, hysteresis=hysteresis))
        head = learning.module.get_parameter("head.weight")
        with torch.no_grad():
            order = head.abs().flatten().argsort()
            # The highest of those out becomes 10 % higher than the lowest of those in.
            head.view(-1)[order[4]] = head.view(-1)[order[5]] * 1.1
        learning.step()
        return learning.regrown["connection"].returns

    assert (returns(0.0), returns(0.2)) == (1, 0)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "depth"])
def test_every_structure_regrows_in_training(structure: str) -> None:
    model = by_name("lenet")
    torch.manual_seed(0)
    inputs = model.inputs(4, 1)
    policy = DynamicPruning(0.5, structure, every=1, ramp=0.0, hysteresis=0.0)
    learning = attached(trace(model.build(), inputs), policy, steps=24)
    optimizer = torch.optim.SGD(learning.module.parameters(), lr=0.5, momentum=0.9)
    train(learning, inputs, 18, optimizer)
    assert learning.regrown[structure].returns > 0


# Mixtures -----------------------------------------------------------------------------------------


def test_a_mixture_keeps_what_all_its_structures_keep(program: Program) -> None:
    def masks(structure: str, sparsity: Any, scope: str = "group") -> Any:
        options = DynamicPruning(sparsity, structure, scope, ramp=0.0)
        return attached(program, options).harden().masks

    both = masks("connection+row+filter", (0.5, 0.25, 0.4))
    alone = masks("connection", 0.5).connections, masks("row", 0.25).connections
    for name in WEIGHTS:
        keep = [m[name] for m in alone if name in m]
        assert torch.equal(both.connections[name], torch.stack(keep).all(0))
    assert torch.equal(both.neurons, masks("filter", 0.4).neurons)
    scopes = ("global", "group", "class")
    spread = DynamicPruning((0.5, 0.25, 0.4), "connection+row+filter", scopes, ramp=0.0)
    found = attached(program, spread).harden().masks
    everywhere = masks("connection", 0.5, "global").connections["stem.weight"]
    assert torch.equal(
        found.connections["stem.weight"], everywhere & masks("row", 0.25).connections["stem.weight"]
    )


def test_one_sparsity_serves_all(program: Program) -> None:
    pass_ = DynamicPruning(0.5, "connection+filter")
    assert pass_.sparsities == (0.5, 0.5)
    text = "dynamic-pruning{sparsity=[0.9,0.5],structure=connection+filter}"
    given = DynamicPruning((0.9, 0.5), "connection+filter")
    assert str(given) == text
    from fxprune.passes import table
    from fxprune.policy import as_policy

    assert as_policy(text, table()).passes == (given,)


# Interrupted, prepared, compiled ------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["connection", "filter", "row+neuron"])
def test_state_dicts_resume_bit_for_bit(program: Program, structure: str) -> None:
    options = DynamicPruning(0.5, structure, every=2)
    whole = attached(program, options)
    train(whole, (BATCHES[0],), STEPS)

    first, second = attached(program, options), attached(program, options)
    optimizer = train(first, (BATCHES[0],), 5)
    second.module.load_state_dict(first.module.state_dict())
    resumed = torch.optim.Adam(second.module.parameters(), lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, (BATCHES[0],), STEPS - 5, resumed)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], tensor), name
    assert second.regrown == whole.regrown


def test_a_broken_run_continues_where_it_was(program: Program, tmp_path: Path) -> None:
    check_that_it_continues(program, DynamicPruning(0.7, "connection+filter", every=3), tmp_path)


def test_compile_prunes_trains_and_shrinks() -> None:
    model = tagger()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    compact = fxprune.compile(
        model,
        "dynamic-pruning{sparsity=[0.8,0.4],structure=connection+neuron}",
        example_inputs=BATCHES[0],
        task=make_task(),
        progress=False,
    )
    assert compact.report.parameters_after < compact.report.parameters_before
    assert compact.report.sparsity > 0.8
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_prepare_serves_a_loop_of_the_users_own() -> None:
    prepared = fxprune.prepare(
        tagger(), DynamicPruning(0.5, "filter", every=2), example_inputs=BATCHES[0], steps=STEPS
    )
    optimizer = momentum(prepared.module.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        (mse(prepared.module, BATCHES[step % 8]) + prepared.penalty()).backward()
        optimizer.step()
        prepared.step()
    prepared.module.eval()
    expected = prepared.module(BATCHES[0])
    compact = prepared.convert()
    assert compact.report.parameters_after < compact.report.parameters_before
    assert torch.allclose(compact.module(BATCHES[0]), expected, atol=1e-6)


def test_twice_in_a_row(program: Program) -> None:
    """What the first left is what the second takes its fraction of."""
    once = prune(program, DynamicPruning(0.5)).program
    twice = prune(once, DynamicPruning(0.5)).program.masks.connections
    for name, size in WEIGHTS.items():
        assert bool((once.masks.connections[name] >= twice[name]).all())
        left = size - size // 2
        assert int(twice[name].sum()) == left - left // 2


def test_twice_in_a_policy_with_checkpoints(program: Program, tmp_path: Path) -> None:
    """Each has its own, and both are found again."""
    facts = Facts(program, Context(make_task(checkpoint=tmp_path)))
    passes = [DynamicPruning(0.5), DynamicPruning(0.5)]
    first = run_passes(program, passes, facts=facts).program
    assert len(list(tmp_path.iterdir())) == 2
    again = run_passes(program, passes, facts=facts).program
    assert again.masks.same_as(first.masks)
    assert all(torch.equal(t, again.tensors[n]) for n, t in first.tensors.items())


def test_what_an_earlier_pass_cut_stays_cut(program: Program) -> None:
    cut = run_passes(program, [Magnitude(0.4)]).program
    outcome = prune(cut, DynamicPruning(0.3, "filter", ramp=0.0))
    first, second = (set(p.masks.neurons.tolist()) for p in (cut, outcome.program))
    assert first < second
    learning = attached(cut, DynamicPruning(0.3, "filter", ramp=0.0))
    learning.module(BATCHES[0]).sum().backward()
    stem = learning.module.get_parameter("stem.weight").grad
    assert stem is not None
    group = analyze(program).group("stem").neurons.tolist()
    gone = [i for i, n in enumerate(group) if n in first]
    assert gone
    assert not bool(stem[gone].any())  # it has no gate that gradients could pass


# What stays, and what is refused ------------------------------------------------------------------


def test_protected_weights_and_units_stay(program: Program) -> None:
    outcome = prune(program, DynamicPruning(0.6, "connection+filter"), protect=("rnn.*",))
    assert not any(name.startswith("rnn.") for name in outcome.program.masks.connections)
    units = analyze(program).group("rnn.l0").neurons
    assert not bool(torch.isin(outcome.program.masks.neurons, units).any())
    assert Refusal("rnn.weight_hh_l0", "protected") in outcome.refusals
    assert Refusal("rnn.l0", "5 of 5 neurons stay: protected") in outcome.refusals


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s not in ("connection", "depth")])
def test_no_layer_is_emptied(program: Program, structure: str) -> None:
    learning = attached(program, DynamicPruning(0.99, structure, ramp=0.0))
    hard = learning.harden()
    assert all(bool(keep.any()) for keep in hard.masks.connections.values())
    left = torch.ones(analyze(program).count, dtype=torch.bool)
    left[hard.masks.neurons] = False
    assert all(bool(left[g.neurons].any()) for g in analyze(program).groups)
    # 99 % of a few are all but one of them; taken all together, some have to be spared.
    together = attached(program, DynamicPruning(0.99, structure, scope="global", ramp=0.0))
    assert any("none may go empty" in r.reason for r in together.refusals)


def test_nothing_to_remove_is_refused(program: Program) -> None:
    with pytest.raises(PreconditionError, match="no residual branch of this model may be removed"):
        prune(program, DynamicPruning(0.5, "depth"))
    single = trace(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(PreconditionError, match="no neuron of this model may be removed"):
        fxprune.prepare(single, DynamicPruning(0.5, "filter"), steps=4)


def test_sparsity_0_masks_nothing(program: Program) -> None:
    for structure in ("connection", "neuron", "depth+row"):
        learning = attached(program, DynamicPruning(0.0, structure, every=1))
        train(learning, (BATCHES[0],), STEPS)
        assert learning.harden().masks.empty


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1}, r"'sparsity' of pass 'dynamic-pruning' must be a number in \[0, 1\)"),
        ({"sparsity": True}, "'sparsity' of pass 'dynamic-pruning' must be a number"),
        ({"sparsity": (0.5, 0.5)}, "has 2 values for 1 structures"),
        ({"structure": "unit"}, "'structure' of pass 'dynamic-pruning' must be one of connection"),
        ({"structure": "row+row"}, "several different ones joined by"),
        ({"structure": ("row",)}, "'structure' of pass 'dynamic-pruning' must be one of"),
        ({"scope": "layer"}, "'scope' of pass 'dynamic-pruning' must be one of"),
        ({"scope": ("group", "class")}, "'scope' of pass 'dynamic-pruning' has 2 values"),
        ({"every": 0}, "'every' of pass 'dynamic-pruning' must be an integer"),
        ({"start": 0.6}, "start \\+ ramp <= end <= 1"),
        ({"end": 1.5}, "start \\+ ramp <= end <= 1"),
        ({"ramp": -0.1}, "'ramp' of pass 'dynamic-pruning' must be a number at least 0"),
        ({"hysteresis": -1}, "'hysteresis' of pass 'dynamic-pruning' must be a number"),
        ({"regrow": 1}, "'regrow' of pass 'dynamic-pruning' must be one of"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DynamicPruning(**({"sparsity": 0.5} | options))


def test_lists_are_as_good_as_tuples() -> None:
    lists: Any = ([0.5, 0.6], "connection+filter", ["group", "global"])
    given = DynamicPruning(*lists)
    assert given == DynamicPruning((0.5, 0.6), "connection+filter", ("group", "global"))
    assert hash(given) == hash(as_policy(str(given), {given.name: DynamicPruning}).passes[0])


# Forms of input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["connection", "filter"])
def test_batch_and_length_1_and_bfloat16(structure: str) -> None:
    model = tagger().bfloat16()
    x = torch.randn(1, 1, 4).bfloat16()
    program = trace(model, x)
    learning = attached(program, DynamicPruning(0.5, structure, every=2))
    train(learning, (x,), STEPS, torch.optim.SGD(learning.module.parameters(), lr=0.1))
    hard = learning.harden()
    masked = insert_masks(hard, analyze(hard)).module()
    output = learning.module(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(masked(x), output)


def test_frozen_weights_are_masked_and_keep_their_values(program: Program) -> None:
    frozen = nn.Parameter(program.tensors["head.weight"].detach().clone(), requires_grad=False)
    given = replace(program, tensors={**program.tensors, "head.weight": frozen})
    after = prune(given, DynamicPruning(0.5)).program
    keep = after.masks.connections["head.weight"]
    assert torch.equal(after.tensors["head.weight"], frozen * keep)
    assert not after.tensors["head.weight"].requires_grad


@pytest.mark.parametrize("structure", ["channel", "row+neuron", "depth"])
def test_a_buffer_that_serves_as_a_weight_counts_and_stays(structure: str) -> None:
    class Framed(nn.Module):
        """A residual branch around a fixed basis, as of a Fourier transform."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.head = nn.Linear(4, 6), nn.Linear(5, 4), nn.Linear(4, 2)
            self.register_buffer("basis", torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            hidden = functional.linear(self.up(x), self.get_buffer("basis"))
            return self.head(x + self.down(torch.relu(hidden)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Framed(), torch.randn(3, 4)
    learning = attached(trace(model, x), DynamicPruning(0.5, structure, ramp=0.0))
    train(learning, (x,), STEPS)
    hard = learning.harden()
    assert "basis" not in hard.masks.connections
    assert torch.equal(hard.tensors["basis"], model.get_buffer("basis"))
    assert_same(learning.module, insert_masks(hard, analyze(hard)).module(), (x,), 1e-6)


def test_same_seed_same_result_and_nothing_else_changes(program: Program) -> None:
    before = {n: t.detach().clone() for n, t in program.tensors.items()}
    state = torch.get_rng_state()
    first, second = (prune(program, DynamicPruning(0.7)).program for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.masks.same_as(second.masks)
    for name, tensor in program.tensors.items():
        assert torch.equal(first.tensors[name], second.tensors[name])
        assert torch.equal(tensor, before[name])
