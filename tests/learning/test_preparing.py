"""Passes that learn, in a training loop of the user's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import ConfigError, PreconditionError, TrainingError
from fxprune.passes import (
    DynamicPruning,
    GradualMagnitude,
    Magnitude,
    NeuronSelection,
    Sensitivity,
    StageWise,
)
from fxprune.weights import owned, with_weights_of


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]


EXAMPLE = torch.zeros(3, 2, 4)
BATCHES = [torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(s)) for s in range(4)]


def mse(model: nn.Module, batch: Tensor) -> Tensor:
    return functional.mse_loss(model(batch), batch[..., :2])


def make_task() -> fxprune.Task:
    return fxprune.Task(mse, BATCHES, lambda m: float(mse(m, BATCHES[0])), "min", epochs=2)


def train(prepared: fxprune.Prepared, steps: int) -> None:
    optimizer = torch.optim.SGD(prepared.module.parameters(), lr=0.1, momentum=0.9)
    prepared.module.train()
    for step in range(steps):
        optimizer.zero_grad()
        (mse(prepared.module, BATCHES[step % 4]) + prepared.penalty()).backward()
        optimizer.step()
        prepared.step()


def test_what_broke_down_is_not_converted() -> None:
    prepared = fxprune.prepare(Tagger(), DynamicPruning(0.5), example_inputs=EXAMPLE, steps=2)
    with torch.no_grad():
        next(prepared.module.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(TrainingError, match="holds NaN or infinity: the training broke down"):
        prepared.convert()


def test_what_was_converted_does_not_train_on() -> None:
    prepared = fxprune.prepare(Tagger(), Magnitude(0.5), example_inputs=EXAMPLE)
    compact = prepared.convert()
    before = compact.masked(BATCHES[0])
    train(prepared, 1)
    assert not torch.equal(prepared.module(BATCHES[0]), before)
    assert torch.equal(compact.masked(BATCHES[0]), before)
    torch.testing.assert_close(compact.module(BATCHES[0]), before)


def test_passes_before_apply_now_and_those_after_at_the_end() -> None:
    model = Tagger()
    policy = [
        Magnitude(0.5),
        GradualMagnitude(0.5, every=1),
        Magnitude(0.5, structure="connection"),
    ]
    prepared = fxprune.prepare(model, policy, example_inputs=EXAMPLE, steps=8)
    before = copy.deepcopy(model.state_dict())
    train(prepared, 8)
    compact = prepared.convert()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    shapes = {n: tuple(p.shape) for n, p in compact.module.named_parameters()}
    assert shapes["rnn.weight_hh_l0"] == (9, 3)
    # 27 connections: half of them while training, half of the rest afterwards.
    zeros = int((compact.module.get_parameter("rnn.weight_hh_l0") == 0).sum())
    assert zeros == 27 - 7


def test_steps_come_from_a_task_as_well() -> None:
    gradual = GradualMagnitude(0.5, end=1.0, every=1)
    prepared = fxprune.prepare(Tagger(), gradual, example_inputs=EXAMPLE, task=make_task())
    train(prepared, 7)
    early = prepared.convert().report.by_class
    train(prepared, 1)
    final = prepared.convert().report.by_class
    assert sum(c.after for c in final.values()) < sum(c.after for c in early.values())


def test_the_report_says_if_masks_were_not_final() -> None:
    gradual = GradualMagnitude(0.5, end=1.0)
    prepared = fxprune.prepare(Tagger(), gradual, example_inputs=EXAMPLE, steps=4)
    train(prepared, 3)
    assert any("masks were not final" in note for note in prepared.convert().report.notes)
    train(prepared, 1)
    assert prepared.convert().report.notes == ()


@pytest.fixture
def double_by_default() -> Iterator[None]:
    """New tensors are float64 unless they say otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normed(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)).to(dtype)


@pytest.mark.parametrize("criterion", ["l0", "group_lasso"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_any_precision_learn(dtype: torch.dtype, criterion: Any) -> None:
    _learns(dtype, criterion)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("criterion", ["l0", "group_lasso"])
def test_what_torch_makes_by_default_does_not_matter(criterion: Any) -> None:
    _learns(torch.float32, criterion)


def _learns(dtype: torch.dtype, criterion: Any) -> None:
    policy = NeuronSelection(0.5, criterion=criterion, scope="all", cost="parameters")
    x = torch.randn(5, 4, dtype=dtype)
    prepared = fxprune.prepare(normed(dtype), policy, example_inputs=x, steps=2)
    before = {n: b.dtype for n, b in prepared.module.named_buffers()}
    for _ in range(2):
        loss = prepared.module(x).square().mean() + prepared.penalty()
        loss.backward()
        prepared.step()
    assert {n: b.dtype for n, b in prepared.module.named_buffers()} == before
    compact = prepared.convert()
    result = compact.module(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, prepared.module.eval()(x), rtol=0.02, atol=0.02)
    assert compact.report.parameters_after < compact.report.parameters_before


def test_copies_are_refused() -> None:
    prepared = fxprune.prepare(Tagger(), GradualMagnitude(0.5), example_inputs=EXAMPLE, steps=8)
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match=r"neither copied nor pickled: .*state_dict\(\)"):
            copier(prepared)


def test_gradients_can_be_looked_at_before_the_loop() -> None:
    one_shot = Sensitivity("gradient", sparsity=0.5)
    with pytest.raises(PreconditionError, match="task"):
        fxprune.prepare(Tagger(), one_shot, example_inputs=EXAMPLE)
    prepared = fxprune.prepare(Tagger(), one_shot, example_inputs=EXAMPLE, task=make_task())
    assert prepared.convert().report.sparsity > 0.3


def test_what_cannot_be_prepared_is_refused() -> None:
    with pytest.raises(ConfigError, match="give steps="):
        fxprune.prepare(Tagger(), GradualMagnitude(0.5), example_inputs=EXAMPLE)
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        fxprune.prepare(Tagger(), GradualMagnitude(0.5), example_inputs=EXAMPLE, steps=0)
    for steps in ("x", 0, 2.5, True):
        with pytest.raises(ConfigError, match=f"give steps=.* at least 1, not {steps!r}"):
            fxprune.prepare(Tagger(), Magnitude(0.5), example_inputs=EXAMPLE, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="both learn"):
        twice = [GradualMagnitude(0.5), GradualMagnitude(0.6)]
        fxprune.prepare(Tagger(), twice, example_inputs=EXAMPLE, steps=5)
    with pytest.raises(ConfigError, match="trains the model itself"):
        fxprune.prepare(Tagger(), StageWise(0.1), example_inputs=EXAMPLE, steps=5)


def test_owned_tensors_are_copies_and_come_back() -> None:
    model = Tagger()
    program = fxprune.trace(model, EXAMPLE)
    own = owned(program, {"head.bias": torch.tensor([1.0, 2.0])})
    assert own.tensors["head.bias"].tolist() == [1.0, 2.0]
    for name, tensor in own.tensors.items():
        assert tensor is not program.tensors[name]
        assert isinstance(tensor, nn.Parameter)
    module = own.module()
    with torch.no_grad():
        module.get_parameter("head.bias").add_(1.0)
    assert with_weights_of(own, module).tensors["head.bias"].tolist() == [2.0, 3.0]
    with pytest.raises(ConfigError, match="traced in"):
        with_weights_of(own, module.double())
