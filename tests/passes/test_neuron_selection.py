"""Neuron selection: what gates compute, what they cost, and that hardening changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.learning.candidates import SCOPES
from fxprune.learning.hard_concrete import HardConcrete
from fxprune.masking.insertion import insert_masks
from fxprune.passes import Magnitude, NeuronSelection
from fxprune.passes.neuron_selection import _Selection
from fxprune.policy import as_policy
from fxprune.preparing import Prepared
from fxprune.training import Task
from fxprune.training.task import adam as default_adam
from tests.laws import assert_same
from tests.passes import tagging
from tests.passes.tagging import BATCHES, EXAMPLE, KilledLoss, Tagger, mse
from tests.zoo import by_name


def make_task(**options: Any) -> Task:
    return tagging.make_task(**({"optimizer": default_adam, "epochs": 8} | options))


def tagger() -> Tagger:
    return tagging.tagger(8, 2)


def prepared(options: NeuronSelection, steps: int = 40, model: nn.Module | None = None) -> Prepared:
    return fxprune.prepare(model or tagger(), options, example_inputs=EXAMPLE, steps=steps)


def selection(prepared: Prepared) -> _Selection:
    learning = prepared._learning
    assert isinstance(learning, _Selection)
    return learning


def train(prepared: Prepared, steps: range, optimizer: torch.optim.Optimizer) -> None:
    prepared.module.train()
    for step in steps:
        torch.manual_seed(step)  # of the gates' noise
        optimizer.zero_grad()
        (mse(prepared.module, BATCHES[step % 8]) + prepared.penalty()).backward()
        optimizer.step()
        prepared.step()


def adam(prepared: Prepared) -> torch.optim.Optimizer:
    return torch.optim.Adam(prepared.module.parameters(), 1e-2)


# What the gates are -------------------------------------------------------------------------------


def test_one_step_by_hand() -> None:
    """Gradients of gates: of the loss through the scales, and of the penalty."""
    made = prepared(NeuronSelection(penalty=0.3, rate=0.05), steps=40)
    learning = selection(made)
    gates = learning.gates
    assert isinstance(gates, HardConcrete)
    assert len(gates.candidates) == 6 + 8 + 8  # stem, first and second layer
    with torch.no_grad():
        gates.logits.values.copy_(torch.linspace(-1, 1, 22))
    a = gates.logits.values.detach().clone().requires_grad_()
    torch.manual_seed(7)
    u = torch.rand(22).clamp(1e-6, 1 - 1e-6)
    s = (torch.sigmoid((u.log() - (1 - u).log() + a) / (2 / 3)) * 1.2 - 0.1).clamp(0, 1)
    z0, z1, z2 = s.split([6, 8, 8])
    weights = {n: p.detach() for n, p in made.module.named_parameters()}

    def scaled(layer: int, inputs: Tensor, units: Tensor) -> nn.GRU:
        return {
            "weight_ih_l0": weights[f"rnn.weight_ih_l{layer}"] * inputs,
            "weight_hh_l0": weights[f"rnn.weight_hh_l{layer}"] * units,
            "bias_ih_l0": weights[f"rnn.bias_ih_l{layer}"],
            "bias_hh_l0": weights[f"rnn.bias_hh_l{layer}"],
        }  # type: ignore[return-value]

    x = torch.tanh(functional.linear(BATCHES[0], weights["stem.weight"], weights["stem.bias"]))
    for layer, inputs, units in ((0, z0, z1), (1, z1, z2)):
        rnn = nn.GRU(x.shape[-1], 8)
        x = torch.func.functional_call(rnn, scaled(layer, inputs, units), (x,))[0]  # type: ignore[arg-type]
    y = functional.linear(x, weights["head.weight"] * z2, weights["head.bias"])
    loss = functional.mse_loss(y, BATCHES[0][..., :2])

    p0, p1, p2 = torch.sigmoid(a + (2 / 3) * math.log(11)).split([6, 8, 8])

    def square(p: Tensor) -> Tensor:
        return p.outer(p).sum() - p.square().sum() + p.sum()

    kept = 4 * p0.sum() + 3 * (p0.sum() * p1.sum() + square(p1))
    kept = kept + 3 * (p1.sum() * p2.sum() + square(p2)) + 2 * p2.sum()
    penalty = 0.3 * kept / (4 * 6 + 3 * (6 * 8 + 64) + 3 * (64 + 64) + 2 * 8)
    (loss + penalty).backward()

    made.module.train()
    torch.manual_seed(7)
    output = made.module(BATCHES[0])
    torch.testing.assert_close(output, y, rtol=0, atol=1e-6)
    found = made.penalty()
    torch.testing.assert_close(found, penalty, rtol=1e-6, atol=0)
    (functional.mse_loss(output, BATCHES[0][..., :2]) + found).backward()
    assert a.grad is not None
    gradient = gates.logits.values.grad
    assert gradient is not None
    torch.testing.assert_close(gradient, a.grad, rtol=1e-4, atol=1e-8)
    made.step()  # Adam's first step goes by the rate, whatever the gradient
    moved = gates.logits.values.detach() - a.detach()
    torch.testing.assert_close(moved, -0.05 * a.grad.sign(), rtol=1e-3, atol=1e-5)


def test_gates_begin_open_and_are_random_only_in_training() -> None:
    model = tagger()
    module = prepared(NeuronSelection(target=0.5), model=model).module
    assert torch.equal(module(BATCHES[0]), module(BATCHES[0]))
    torch.testing.assert_close(module(BATCHES[0]), model(BATCHES[0]), rtol=0, atol=1e-6)
    module.train()
    first = module(BATCHES[0])
    assert not torch.equal(first, module(BATCHES[0]))


def test_a_group_keeps_its_best_neuron_in_both_modes() -> None:
    made = prepared(NeuronSelection(target=0.5))
    gates = selection(made).gates
    assert isinstance(gates, HardConcrete)
    with torch.no_grad():
        gates.logits.values.fill_(-4.6)
        gates.logits.values[[2, 9, 20]] = -4.5
    open_ = torch.zeros(22, dtype=torch.bool)
    open_[[2, 9, 20]] = True
    assert torch.equal(gates.settled() > 0, open_)
    assert bool((gates.moving() > 0).any())
    compact = made.convert()
    assert [g.neurons.after for g in compact.report.groups] == [4, 1, 1, 1, 2]
    made.module.eval()
    assert_same(made.module, compact.module, (BATCHES[0],), 1e-6)


# The whole way ------------------------------------------------------------------------------------

MODELS = (
    "lstm-two-layer",
    "bigru-two-layer",
    "lstm-projected-states",
    "packed-gru-unsorted",
    "gru-cell-loop",
    "tied-character-model",
    "residual-cnn",
)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("criterion", ["l0", "group_lasso"])
@pytest.mark.parametrize("name", MODELS)
def test_hardened_is_what_was_evaluated(name: str, criterion: Any) -> None:
    model = by_name(name)
    torch.manual_seed(0)
    inputs = model.inputs(model.batch, model.time)
    rate = 0.3 if criterion == "l0" else None
    options = NeuronSelection(
        target=0.4, criterion=criterion, scope="all", rate=rate, cost="parameters"
    )
    made = fxprune.prepare(model.build(), options, example_inputs=inputs, steps=12)
    optimizer = torch.optim.SGD(made.module.parameters(), 0.05)
    made.module.train()
    for _ in range(12):
        output = pytree.tree_leaves(made.module(*inputs))
        loss = sum(y.float().square().mean() for y in output if isinstance(y, Tensor))
        optimizer.zero_grad()
        (loss + made.penalty()).backward()
        optimizer.step()
        made.step()
    learning = selection(made)
    assert learning.finished
    made.module.eval()
    hardened = learning.harden()
    assert len(hardened.masks.neurons)
    reference = insert_masks(hardened, learning.neurons).module()
    assert_same(made.module, reference, inputs, 1e-6)
    report = made.convert().report
    assert report.parameters_after <= 0.4 * report.parameters_before


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", ["lstm-two-layer", "gru-cell-loop", "tied-projected-lm"])
def test_rows_are_scaled_and_folded_too(name: str) -> None:
    model = by_name(name)
    torch.manual_seed(0)
    inputs = model.inputs(model.batch, model.time)
    built = model.build()
    outputs = []
    for rows in (False, True):
        options = NeuronSelection(target=0.6, scope="all", rows=rows)
        made = fxprune.prepare(built, options, example_inputs=inputs, steps=12)
        learning = selection(made)
        assert isinstance(learning.gates, HardConcrete)
        with torch.no_grad():
            learning.gates.logits.values.copy_(torch.linspace(-2.6, 2.6, len(learning.gates.final)))
        reference = insert_masks(learning.harden(), learning.neurons).module()
        assert_same(made.module, reference, inputs, 1e-6)
        assert made.convert().report.parameters_after > 0
        outputs.append(pytree.tree_leaves(made.module(*inputs))[0])
    assert bool((outputs[0] - outputs[1]).abs().max() > 1e-3)


@pytest.mark.parametrize("criterion", ["l0", "group_lasso"])
def test_a_resumed_training_is_the_unbroken_one(criterion: Any) -> None:
    options = NeuronSelection(target=0.3, criterion=criterion)
    whole, early, late = (prepared(options) for _ in range(3))
    train(whole, range(40), adam(whole))
    first, second = adam(early), adam(late)
    for stop in (range(17), range(17, 40)):
        if stop.start:
            late.module.load_state_dict(early.module.state_dict())
            second.load_state_dict(first.state_dict())
            train(late, stop, second)
        else:
            train(early, stop, first)
    expected = whole.module.state_dict()
    for name, value in late.module.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("cost", ["macs", "milliseconds"])
def test_a_run_that_was_stopped_continues(cost: Any, tmp_path: Path) -> None:
    """Though milliseconds are measured anew, it is known as the same run."""
    loss = KilledLoss(20, KeyboardInterrupt)

    def run() -> fxprune.Compact:
        task = make_task(loss=loss, epochs=4, checkpoint=tmp_path)
        options = NeuronSelection(target=0.5, cost=cost)
        return fxprune.compile(tagger(), options, example_inputs=EXAMPLE, task=task, progress=False)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert run().report.parameters_after < 864
    assert loss.calls == 20 + 16  # two of four epochs were done


@pytest.mark.parametrize(("cost", "target"), [("macs", 0.5), ("macs", 0.15), ("parameters", 0.6)])
def test_compile_lands_at_the_target(cost: Any, target: float) -> None:
    options = NeuronSelection(target=target, cost=cost, scope="all")
    compact = fxprune.compile(
        tagger(), options, example_inputs=EXAMPLE, task=make_task(), progress=False
    )
    report = compact.report
    left = (
        report.macs_after / report.macs_before
        if cost == "macs"
        else report.parameters_after / report.parameters_before
    )
    assert target - 0.05 < left <= target  # a unit is up to 5%
    again = fxprune.compile(
        compact.program, NeuronSelection(target=0.9), task=make_task(epochs=2), progress=False
    )
    assert again.report.parameters_after < report.parameters_after


@pytest.mark.parametrize("criterion", ["l0", "group_lasso"])
def test_best_weights_are_restored_where_a_kernel_becomes_units(criterion: Any) -> None:
    """A part of the cost that is written out must be memory of its own."""
    model = by_name("conv2d-gru")
    torch.manual_seed(0)
    inputs = model.inputs(model.batch, model.time)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return module(*batch).square().mean()  # type: ignore[no-any-return]

    task = Task(loss, [inputs] * 4, lambda m: float(loss(m, inputs)), "min", epochs=2)
    options = NeuronSelection(target=0.5, criterion=criterion, scope="all")
    compact = fxprune.compile(
        model.build(), options, example_inputs=inputs, task=task, progress=False
    )
    assert compact.report.macs_after <= 0.5 * compact.report.macs_before


def test_a_penalty_closes_more_the_stronger_it_is() -> None:
    left = [
        fxprune.compile(
            tagger(),
            NeuronSelection(penalty=strength),
            example_inputs=EXAMPLE,
            task=make_task(epochs=10),
            progress=False,
        ).report.parameters_after
        for strength in (0.0, 0.3)
    ]
    assert left[0] == sum(p.numel() for p in tagger().parameters())
    assert left[1] < left[0]


def test_final_gates_are_the_same_in_both_modes() -> None:
    made = prepared(NeuronSelection(target=0.3))
    train(made, range(30), adam(made))
    assert selection(made).finished
    assert float(made.penalty()) == 0.0
    trained = made.module(BATCHES[0])
    assert torch.equal(made.module(BATCHES[0]), trained)
    made.module.eval()
    torch.testing.assert_close(made.module(BATCHES[0]), trained, rtol=0, atol=1e-6)


def test_group_lasso_closes_small_neurons_for_good() -> None:
    made = prepared(NeuronSelection(penalty=0.0, criterion="group_lasso"))
    learning = selection(made)
    weight = made.module.get_parameter("head.weight")
    norm = learning.gates.scores()
    with torch.no_grad():
        for name in ("rnn.weight_ih_l1", "rnn.weight_hh_l1"):
            made.module.get_parameter(name)[[3, 11, 19]] *= 1e-3
        made.module.get_parameter("rnn.weight_hh_l1")[:, 3] = 0.0
        weight[:, 3] = 0.0
    made.step()
    closed = learning.gates.learned() == 0
    assert closed.nonzero().flatten().tolist() == [6 + 8 + 3]
    with torch.no_grad():
        weight[:, 3] = 10.0
    made.step()
    assert torch.equal(learning.gates.learned() == 0, closed)
    assert float(learning.gates.scores()[17]) > float(norm[17])


def norms_by_group(p: Mapping[str, Tensor]) -> list[Tensor]:
    """Of all that each neuron owns: those of the stem, and of both layers."""

    def norm(*owned: Tensor) -> Tensor:
        return torch.cat([v.detach().flatten() for v in owned]).square().sum().sqrt()

    stem = [norm(p["stem.weight"][k], p["rnn.weight_ih_l0"][:, k]) for k in range(6)]
    groups = [torch.stack(stem)]
    for layer, reader in ((0, "rnn.weight_ih_l1"), (1, "head.weight")):
        found = []
        for k in range(8):
            rows, others = [k, 8 + k, 16 + k], [i for i in range(24) if i % 8 != k]
            w_hh, w_ih = p[f"rnn.weight_hh_l{layer}"], p[f"rnn.weight_ih_l{layer}"]
            found.append(norm(w_ih[rows], w_hh[rows], w_hh[others][:, k], p[reader][:, k]))
        groups.append(torch.stack(found))
    return groups


def test_norms_are_of_all_a_neuron_owns_as_fractions_of_its_groups_first_mean() -> None:
    made = prepared(NeuronSelection(penalty=0.5, criterion="group_lasso"))
    p = dict(made.module.named_parameters())
    references = [norms.mean() for norms in norms_by_group(p)]
    with torch.no_grad():
        for factor, name in enumerate(("stem.weight", "rnn.weight_hh_l0", "head.weight"), 2):
            p[name].mul_(factor)
    now = zip(norms_by_group(p), references, strict=True)
    total = torch.stack([(norms / reference).sum() for norms, reference in now]).sum()
    torch.testing.assert_close(made.penalty().detach(), 0.5 * total, rtol=1e-5, atol=0)


def test_a_group_that_begins_at_zero_is_not_judged() -> None:
    model = tagger()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["stem.weight"].zero_()
        weights["rnn.weight_ih_l0"].zero_()
    made = prepared(NeuronSelection(penalty=0.5, criterion="group_lasso"), model=model)
    assert float(made.penalty().detach()) == pytest.approx(0.5 * (8 + 8), rel=1e-5)
    made.step()
    assert bool((selection(made).gates.learned() == 1).all())


# What is left alone, and what is refused ----------------------------------------------------------


def test_protected_neurons_have_no_gate() -> None:
    policy = fxprune.Policy([NeuronSelection(target=0.6)], protect=("rnn.*_l1",))
    made = fxprune.prepare(tagger(), policy, example_inputs=EXAMPLE, steps=40)
    learning = selection(made)
    assert len(learning.gates.candidates) == 6 + 8
    assert any("protected" in r.reason for r in learning.refusals)
    train(made, range(40), adam(made))
    assert [g.neurons.after for g in made.convert().report.groups][3] == 8


def test_scope_says_which_neurons_have_gates() -> None:
    class Longer(Tagger):
        def __init__(self) -> None:
            super().__init__(8, 2)
            self.first = nn.Linear(4, 4)
            self.last = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(self.first(x)))  # type: ignore[no-any-return]

    sizes = {}
    for scope in SCOPES:
        made = prepared(NeuronSelection(target=0.5, scope=scope), model=Longer())  # type: ignore[arg-type]
        sizes[scope] = len(selection(made).gates.candidates)
    assert sizes == {"recurrent": 22, "all": 22 + 4 + 2}


def test_other_precisions_and_a_model_in_eval() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = tagger().to(dtype).eval()
        options = NeuronSelection(target=0.4)
        made = fxprune.prepare(model, options, example_inputs=EXAMPLE[:1, :1].to(dtype), steps=4)
        optimizer = torch.optim.SGD(made.module.parameters(), 0.1)
        made.module.train()
        for batch in BATCHES[:4]:
            (mse(made.module, batch[:1, :1].to(dtype)) + made.penalty()).backward()
            optimizer.step()
            made.step()
        gates = selection(made).gates
        assert isinstance(gates, HardConcrete)
        assert gates.logits.values.dtype == torch.float32
        compact = made.convert()
        made.module.eval()
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-12
        assert_same(made.module, compact.module, (BATCHES[0].to(dtype),), tolerance)
        assert not model.training


def test_a_copy_learns_for_itself() -> None:
    made = prepared(NeuronSelection(target=0.3))
    copied = copy.deepcopy(made.module)
    before = {n: v.clone() for n, v in copied.state_dict().items()}
    train(made, range(5), adam(made))
    for name, value in copied.state_dict().items():
        assert torch.equal(value, before[name])


def test_passes_follow_in_what_is_left() -> None:
    policy = [NeuronSelection(target=0.3), Magnitude(0.5, "connection")]
    compact = fxprune.compile(
        tagger(), policy, example_inputs=EXAMPLE, task=make_task(), progress=False
    )
    assert compact.report.macs_after <= 0.3 * compact.report.macs_before
    assert compact.report.sparsity > 0.8


def test_a_target_below_one_neuron_per_group_is_refused() -> None:
    with pytest.raises(PreconditionError, match=r"0\.0\d+ of the macs is the least possible") as e:
        prepared(NeuronSelection(target=0.001))
    # stem 4, layers 3 * (1 + 1) each, head 2
    assert f"{math.ceil((4 + 6 + 6 + 2) / 760 * 1e4) / 1e4:g} of" in str(e.value)


def test_a_penalty_that_closes_everything_stops(tmp_path: Path) -> None:
    strong = NeuronSelection(penalty=1e3, rate=0.9)
    task = make_task(checkpoint=tmp_path)
    with pytest.raises(TrainingError, match="closed the gate of every neuron") as error:
        fxprune.compile(tagger(), strong, example_inputs=EXAMPLE, task=task, progress=False)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(TrainingError, match=r"Task\.checkpoint was not given"):
        fxprune.compile(tagger(), strong, example_inputs=EXAMPLE, task=make_task(), progress=False)


def test_nothing_to_select_is_refused() -> None:
    with pytest.raises(PreconditionError, match="nothing to select"):
        fxprune.prepare(
            nn.Linear(3, 2), NeuronSelection(target=0.5), example_inputs=torch.zeros(1, 3), steps=5
        )


LASSO = {"criterion": "group_lasso"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not neither"),
        ({"target": 0.5, "penalty": 0.1}, "not both"),
        ({"target": 1.0}, "'target' of pass 'neuron-selection' must be a number"),
        ({"target": 0.0}, r"'target' .* must be a number in \(0, 1\), not 0\.0"),
        ({"penalty": -1.0}, "'penalty' of pass 'neuron-selection' must be a number"),
        ({"target": 0.5, "cost": "flops"}, "'cost' of pass 'neuron-selection' must be one of"),
        ({"target": 0.5, "criterion": "l1"}, "'criterion' of pass"),
        ({"target": 0.5, "scope": "global"}, "'scope' of pass"),
        ({"target": 0.5, "drop": 0}, "'drop' of pass"),
        ({"target": 0.5, "rate": 2}, "'rate' of pass"),
        ({"target": 0.5, "ramp": 0.9}, "'ramp' and 'end' of pass"),
        ({"target": 0.5, "end": 1.5}, "'ramp' and 'end' of pass"),
        ({"penalty": 0.5, "end": 1.5}, "'ramp' and 'end' of pass"),
        ({"target": 0.5, "threshold": 0.5}, "'threshold' .* has no effect with criterion=l0"),
        ({"target": 0.5, **LASSO, "drop": 0.3}, "'drop' .* no effect with criterion=group_lasso"),
        ({"target": 0.5, **LASSO, "rate": 0.2}, "'rate' .* no effect with criterion=group_lasso"),
        ({"penalty": 0.5, "ramp": 0.2}, "'ramp' .* has no effect with a penalty"),
        (
            {"penalty": 0.5, **LASSO, "cost": "milliseconds"},
            "'cost' .* has no effect with .* norms",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NeuronSelection(**options)


@pytest.mark.parametrize(
    "options",
    [
        NeuronSelection(
            penalty=0.5, end=0.3
        ),  # the default of what is idle never stands in the way
        NeuronSelection(penalty=0.5, cost="parameters", drop=0.2),
        NeuronSelection(target=0.5, criterion="group_lasso", cost="parameters", threshold=0.2),
    ],
    ids=str,
)
def test_options_that_have_an_effect_read_back(options: NeuronSelection) -> None:
    assert as_policy(str(options), {options.name: NeuronSelection}).passes == (options,)
