"""The fit loop on models small enough to follow by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import ConfigError, TrainingError
from fxprune.training import Task, evaluate, fit
from fxprune.training.placement import moved

ONE = torch.ones(1, 1)


def sgd(**options: Any) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **options)


def scalar(value: float = 4.0) -> nn.Linear:
    """One weight: ``y = w x``."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def weight(module: nn.Module) -> float:
    return float(next(module.parameters()).detach())


def output(model: nn.Module, batch: Any) -> Tensor:
    """The loss whose gradient is the batch: each SGD step lowers the weight by lr times it."""
    value: Tensor = model(batch).sum()
    return value


def make(**options: Any) -> Task:
    chosen = {
        "loss": output,
        "train": [ONE, ONE],
        "validate": weight,
        "goal": "min",
        "optimizer": sgd(lr=1.0),
        "epochs": 3,
        **options,
    }
    return Task(**chosen)


def noisy(**options: Any) -> Task:
    """A task that draws from every global generator."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        scale = random.random() + float(np.random.rand())
        return nn.functional.dropout(model(batch[0]), 0.5).square().sum() * scale

    loader = DataLoader(TensorDataset(torch.arange(8.0).reshape(8, 1)), batch_size=2, shuffle=True)
    return make(loss=loss, train=loader, optimizer=sgd(lr=1e-3), **options)


def halved(optimizer: Optimizer) -> schedulers.LRScheduler:
    return schedulers.StepLR(optimizer, step_size=1, gamma=0.5)


def test_a_scheduler_is_stepped_after_each_step() -> None:
    module = scalar(4)
    fit(module, make(scheduler=halved, epochs=2))
    assert weight(module) == 4 - (1 + 0.5 + 0.25 + 0.125)


@pytest.mark.parametrize("total", [7, 8])
def test_a_schedule_lasts_for_all_steps(total: int) -> None:
    task = make(scheduler=lambda o: schedulers.OneCycleLR(o, 0.1, total), epochs=4)
    if total == 8:
        assert fit(scalar(4), task).steps == 8
        return
    with pytest.raises(TrainingError, match=r"step 8: the OneCycleLR of Task.scheduler .* make it"):
        fit(scalar(4), task)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (schedulers.ReduceLROnPlateau, "made a ReduceLROnPlateau: it must .* without a metric"),
        (lambda optimizer: 0.5, "made a float"),
    ],
)
def test_what_is_no_scheduler_is_refused(scheduler: Any, message: str) -> None:
    module = scalar(4)
    with pytest.raises(ConfigError, match=rf"Task\.scheduler {message}"):
        fit(module, make(scheduler=scheduler))
    assert weight(module) == 4


def test_trains_and_reports() -> None:
    module = scalar(4)
    result = fit(module, make())
    assert weight(module) == -2
    assert result.metrics == (4, 2, 0, -2)
    assert (result.metric, result.best_epoch) == (-2, 3)
    assert (result.epochs, result.steps, result.stopped_early) == (3, 6, False)
    assert result.seconds > 0


def test_the_best_weights_are_restored() -> None:
    module = scalar(4)  # 4, 2, 0, -2: closest to zero after two epochs
    result = fit(module, make(validate=lambda m: abs(weight(m))))
    assert weight(module) == 0
    assert (result.metric, result.best_epoch, result.metrics[-1]) == (0, 2, 2)


def test_the_weights_before_training_are_a_candidate() -> None:
    module = scalar(4)
    result = fit(module, make(goal="max"))
    assert weight(module) == 4
    assert (result.metric, result.best_epoch) == (4, 0)


def test_buffers_are_restored_with_the_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    task = make(train=[torch.randn(4, 2)], validate=lambda m: 1.0)
    fit(module, task)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_last_weights_on_request() -> None:
    module = scalar(4)
    result = fit(module, make(goal="max"), keep="last")
    assert weight(module) == -2
    assert (result.metric, result.best_epoch) == (-2, 0)


def test_no_epochs_only_validates() -> None:
    module = scalar(4)
    result = fit(module, make(epochs=0))
    assert (result.metrics, result.steps, result.stopped_early) == ((4,), 0, False)
    assert weight(module) == 4


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [({"steps": 5, "epochs": None}, 5, 3), ({"steps": 5, "epochs": 2}, 4, 2), ({"steps": 2}, 2, 1)],
)
def test_steps_and_epochs_both_limit(options: dict[str, Any], steps: int, epochs: int) -> None:
    module = scalar(0)
    result = fit(module, make(**options))
    assert (result.steps, result.epochs) == (steps, epochs)
    assert weight(module) == -steps
    assert not result.stopped_early


def test_early_stop() -> None:
    metrics = iter([5.0, 3.0, 4.0, 3.0, 1.0])
    result = fit(scalar(), make(validate=lambda m: next(metrics), patience=2, epochs=4))
    assert result.metrics == (5, 3, 4, 3)  # equal is not better
    assert result.stopped_early
    assert result.best_epoch == 1


def test_clip_limits_the_norm_of_the_gradient() -> None:
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    task = make(train=[torch.tensor([[3.0, 4.0]])], epochs=1, clip=0.5, validate=lambda m: 0.0)
    fit(module, task, keep="last")
    torch.testing.assert_close(module.weight.detach(), torch.tensor([[-0.3, -0.4]]))


def test_a_penalty_is_added_to_the_loss() -> None:
    module = scalar(4)
    fit(module, make(epochs=1), penalty=lambda: 3 * module.weight.sum())
    assert weight(module) == 4 - 2 * (1 + 3)


@pytest.mark.parametrize(
    "optimizer",
    [
        sgd(lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    ],
)
def test_after_step_keeps_masked_weights_at_zero(
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> None:
    module = nn.LSTM(3, 4, batch_first=True)
    parameters = dict(module.named_parameters())
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in parameters.items()}
    seen: list[bool] = []

    def apply_masks() -> None:
        for name, parameter in parameters.items():
            parameter.mul_(masks[name])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        zeros = [(p[~masks[name]] == 0).all() for name, p in parameters.items()]
        seen.append(bool(torch.stack(zeros).all()))
        out: Tensor = model(batch)[0].square().mean()
        return out

    with torch.no_grad():
        apply_masks()
    before = parameters["weight_hh_l0"].detach().clone()
    task = make(loss=loss, train=[torch.randn(2, 5, 3)] * 3, optimizer=optimizer)
    fit(module, replace(task, validate=lambda m: 0.0), after_step=apply_masks, keep="last")
    assert seen == [True] * 9
    assert not torch.equal(parameters["weight_hh_l0"], before)
    for name, parameter in parameters.items():
        assert (parameter[~masks[name]] == 0).all(), name


def test_the_seed_decides_the_run() -> None:
    weights = []
    for seed, disturbance in ((1, 0), (1, 9), (2, 0)):
        torch.manual_seed(disturbance)
        module = scalar(4)
        fit(module, noisy(seed=seed), keep="last")
        weights.append(weight(module))
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_a_loader_with_its_own_generator_repeats_itself() -> None:
    data = TensorDataset(torch.randn(6, 1))
    own = torch.Generator().manual_seed(5)
    orders: list[list[float]] = [[], []]
    for order in orders:

        def loss(model: nn.Module, batch: Any, order: list[float] = order) -> Tensor:
            order.append(float(batch[0]))
            return output(model, batch[0])

        fit(scalar(), make(loss=loss, train=DataLoader(data, shuffle=True, generator=own)))
    assert orders[0] == orders[1]
    assert orders[0][:6] != orders[0][6:12]


def global_draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def reseed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_random_state_is_untouched(fails: bool) -> None:
    module = scalar(4)
    reseed()
    expected = global_draws()
    reseed()
    if fails:
        with pytest.raises(TrainingError):
            fit(module, noisy(validate=lambda m: float("nan") if weight(m) < 4 else 4.0))
    else:
        fit(module, noisy())
    assert global_draws() == expected


def test_validation_does_not_disturb_training() -> None:
    weights = []
    for draws in (0, 3):
        module = scalar(4)

        def validate(model: nn.Module, draws: int = draws) -> float:
            for _ in range(draws):
                global_draws()
            return weight(model)

        fit(module, noisy(validate=validate), keep="last")
        weights.append(weight(module))
    assert weights[0] == weights[1]


@pytest.mark.parametrize("training", [False, True])
def test_modes_gradients_and_grad_mode(training: bool) -> None:
    module = nn.Sequential(scalar(), nn.Dropout(0.0), nn.Sequential(nn.Identity()))
    module.train(training)
    module[1].train(not training)
    modes: list[tuple[str, bool, bool]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        modes.append(("loss", model.training, torch.is_grad_enabled()))
        return output(model, batch)

    def validate(model: nn.Module) -> float:
        modes.append(("validate", model.training, torch.is_grad_enabled()))
        return 1.0

    with torch.no_grad():
        fit(module, make(loss=loss, validate=validate, epochs=1))
        assert not torch.is_grad_enabled()
    step, check = ("loss", True, True), ("validate", False, False)
    assert modes == [check, step, step, check]
    assert [part.training for part in module.modules()] == [
        training, training, not training, training, training
    ]  # fmt: skip
    assert all(parameter.grad is None for parameter in module.parameters())


def test_trains_inside_ambient_inference_mode() -> None:
    module = scalar(4)
    with torch.inference_mode():
        fit(module, make())
    assert weight(module) == -2
    assert not module.weight.is_inference()


def test_frozen_parameters_stay() -> None:
    module = nn.Sequential(scalar(2), scalar(3))
    module[0].weight.requires_grad_(False)
    fit(module, make(epochs=1, optimizer=sgd(lr=1.0, weight_decay=0.5)), keep="last")
    assert weight(module[0]) == 2
    assert weight(module[1]) != 3
    assert not module[0].weight.requires_grad


def test_tied_weights_stay_tied() -> None:
    module = nn.Sequential(scalar(4), scalar(4))
    module[1].weight = module[0].weight
    fit(module, make(goal="max"))
    assert module[1].weight is module[0].weight
    assert weight(module) == 4


def bad_loss(value: Callable[[nn.Module, Any], object]) -> dict[str, Any]:
    return {"loss": value}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            bad_loss(lambda m, b: output(m, b) * math.nan),
            "fine-tune, epoch 1, step 1: the loss is nan: lower the learning rate",
        ),
        (bad_loss(lambda m, b: output(m, b) / 0), "epoch 1, step 1: the loss is inf"),
        (bad_loss(lambda m, b: m(b).expand(2, 3)), r"step 1: Task\.loss .* of shape \(2, 3\)"),
        (bad_loss(lambda m, b: 3.0), r"step 1: Task\.loss returned a float: return one real"),
        (bad_loss(lambda m, b: output(m, b).detach()), "does not depend on the parameters"),
        (bad_loss(lambda m, b: torch.zeros(())), "does not depend on the parameters: compute"),
        ({"validate": lambda m: math.nan}, r"validation of epoch 0: Task\.validate returned nan"),
        ({"validate": lambda m: None}, r"Task\.validate returned None \(NoneType\): it must"),
        ({"validate": lambda m: "3"}, r"Task\.validate returned '3' \(str\)"),
        ({"validate": lambda m: torch.zeros(2)}, r"Task\.validate returned tensor"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict[str, Any], message: str) -> None:
    module = scalar(4)
    module.eval()
    with pytest.raises(TrainingError, match=message):
        fit(module, make(**options))
    assert weight(module) == 4
    assert not module.training
    assert module.weight.grad is None


def test_a_loss_of_another_model_is_refused() -> None:
    other = scalar(4)
    with pytest.raises(TrainingError, match=r"step 1: .*from the module that Task\.loss"):
        fit(scalar(4), make(loss=lambda m, b: output(other, b)))


def test_an_optimizer_of_another_model_is_refused() -> None:
    other = scalar(4)
    with pytest.raises(ConfigError, match="optimizer of other parameters"):
        fit(scalar(4), make(optimizer=lambda p: torch.optim.SGD(other.parameters(), lr=0.1)))


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    other = torch.optim.SGD(scalar(4).parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR
    with pytest.raises(ConfigError, match="scheduler of another optimizer"):
        fit(scalar(4), make(scheduler=lambda o: constant(other)))
    fit(scalar(4), make(scheduler=lambda o: constant(o)))


def test_a_later_failure_names_epoch_and_step() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return output(model, batch) * (math.inf if weight(model) < 1.5 else 1.0)

    with pytest.raises(TrainingError, match="epoch 2, step 4: the loss is inf"):
        fit(scalar(4), make(loss=loss))


def test_a_penalty_that_is_no_scalar() -> None:
    with pytest.raises(TrainingError, match=r"step 1: the penalty returned .* of shape \(3,\)"):
        fit(scalar(), make(), penalty=lambda: torch.zeros(3))


class Exhausted:
    """Gives its batches once only, which no look at its type can tell."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        while self.batches:
            yield self.batches.pop()


def test_no_batches() -> None:
    with pytest.raises(TrainingError, match=r"epoch 1: Task\.train gave no batches"):
        fit(scalar(), make(train=Exhausted([])))
    with pytest.raises(TrainingError, match=r"epoch 2: Task\.train gave no batches"):
        fit(scalar(), make(train=Exhausted([ONE])))


def test_nothing_to_train() -> None:
    with pytest.raises(TrainingError, match="no parameter that requires a gradient"):
        fit(nn.ReLU(), make())


@pytest.mark.parametrize("made", [lambda p: 3, lambda p: torch.optim.LBFGS(p)])
def test_an_optimizer_that_cannot_be_used(made: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"Task\.optimizer made a (int|LBFGS): it must make a torch"
    ):
        fit(scalar(), make(optimizer=made))


def test_keep_is_checked() -> None:
    with pytest.raises(ConfigError, match="keep must be 'best' or 'last', got 'all'"):
        fit(scalar(), make(), keep="all")  # type: ignore[arg-type]


def test_the_device_may_be_named() -> None:
    module = scalar(4)
    fit(module, make(device="cpu"))
    assert weight(module) == -2


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_that_is_not_there() -> None:
    module = scalar(4)
    with pytest.raises(ConfigError, match=r"Task\.device 'cuda' cannot be used .*leave it out"):
        fit(module, make(device="cuda"))
    assert module.weight.device.type == "cpu"


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")  # torch's own matter
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_and_brings_the_module_back() -> None:
    devices: list[str] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        devices.extend((batch.device.type, next(model.parameters()).device.type))
        return output(model, batch)

    torch.cuda.manual_seed(3)
    expected = torch.rand(2, device="cuda")
    torch.cuda.manual_seed(3)
    module = scalar(4)
    fit(module, make(loss=loss, device="cuda"))
    assert set(devices) == {"cuda"}
    assert weight(module) == -2
    assert module.weight.device.type == "cpu"
    assert torch.equal(torch.rand(2, device="cuda"), expected)


class Pair(NamedTuple):
    x: Tensor
    lengths: list[int]


def test_batches_are_moved_whatever_their_form() -> None:
    packed = pack_sequence([torch.ones(2, 1)])
    batch = {"pair": Pair(torch.ones(2), [1]), "more": [(torch.zeros(1), "text")], "packed": packed}
    result = moved(batch, torch.device("meta"))
    assert isinstance(result["pair"], Pair)
    assert result["pair"].lengths == [1]
    assert isinstance(result["packed"], PackedSequence)
    assert result["more"][0][1] == "text"
    for tensor in (result["pair"].x, result["more"][0][0], result["packed"].data):
        assert tensor.device.type == "meta"


@pytest.mark.parametrize("value", [3, 2.5, np.float32(2.5), torch.tensor(2.5), math.inf])
def test_every_kind_of_number_is_a_metric(value: Any) -> None:
    metric = evaluate(scalar(), make(validate=lambda m: value))
    assert type(metric) is float
    assert metric == float(value)


def test_silent_when_piped(capfd: pytest.CaptureFixture[str]) -> None:
    fit(scalar(), make(), progress=True)
    assert capfd.readouterr() == ("", "")
