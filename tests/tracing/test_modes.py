"""What follows train() and eval() is found by comparing the two traces."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.errors import InputError
from fxprune.tracing.modes import compare_modes, steps_of, switchable, without_dropout
from tests.small import frames


def both(model: nn.Module, *inputs: Tensor) -> tuple[list[float | None], str | None]:
    traces = [
        steps_of(torch.export.export(mode(), inputs, strict=False))
        for mode in (model.eval, model.train)
    ]
    return compare_modes(*traces)


def test_dropout_follows_with_its_flag() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.ReLU())
    assert both(model, frames()) == ([1.0], None)


def test_batch_norm_follows_and_its_counter_is_no_difference() -> None:
    model = nn.Sequential(nn.Conv1d(5, 4, 1), nn.BatchNorm1d(4), nn.Dropout(0.5))
    assert both(model, frames()) == ([1.0, 1.0], None)


def test_batch_norm_without_statistics_is_the_same_in_both_modes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False))
    assert both(model, frames()) == ([None], None)


class Attention(nn.Module):
    """Attention whose dropout follows the mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends to itself."""
        p = 0.4 if self.training else 0.0
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=p)


def test_attention_follows_with_its_probability() -> None:
    assert both(Attention(), frames()) == ([0.4], None)


class Always(nn.Module):
    """Dropout in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Drops."""
        return functional.dropout(x, 0.5, training=True)


def test_dropout_that_is_always_on_follows_nothing() -> None:
    assert both(Always(), frames()) == ([None], None)


class Scales(nn.Module):
    """Computes something else in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Doubles or triples."""
        return x * 2 if self.training else x + 3


class Adds(nn.Module):
    """Does more in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Adds noise."""
        x = x.relu()
        return x + torch.randn_like(x) if self.training else x


class Backwards(nn.Module):
    """Drops in eval mode only."""

    def forward(self, x: Tensor) -> Tensor:
        """Drops."""
        return functional.dropout(x, 0.5, training=not self.training)


def test_what_is_on_in_eval_mode_only_is_another_difference() -> None:
    assert both(Backwards(), frames())[1] is not None


@pytest.mark.parametrize(
    ("model", "text"),
    [(Scales(), "aten.add.Tensor becomes aten.mul.Tensor, at .*test_modes.py:"), (Adds(), "")],
)
def test_other_differences_are_told(model: nn.Module, text: str) -> None:
    follows, difference = both(model, frames())
    assert follows == []
    assert difference is not None
    program = fxprune.trace(model, frames())
    module = program.module()
    torch.testing.assert_close(module(frames()), model.eval()(frames()))
    with pytest.raises(InputError, match=f"something else in train mode than in eval.*{text}"):
        module.train()
    assert not module.eval().training


def test_switches_of_a_program() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), Always(), nn.Dropout1d(0.2))
    program = fxprune.trace(model, frames())
    nodes = switchable(program.graph)
    switches: Mapping[str, float] = program.switches
    assert [n.name in switches for n in nodes] == [True, False, True]


class Unread(nn.Module):
    """Computes what nothing reads, and drops what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(5)
        self.unread, self.read = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 5, 3] to [batch, 5, 4]."""
        y = self.linear(x)
        self.norm(y)
        self.unread(y)
        dropped: Tensor = self.read(y)
        return dropped


def test_what_leads_nowhere_is_no_difference() -> None:
    model = Unread()
    assert both(model, frames()) == ([1.0], None)
    program = fxprune.trace(model, frames())
    assert program.mode_difference is None
    module = program.module().train()
    assert not torch.equal(module(frames()), module(frames()))


def test_dropout_that_is_always_on_can_be_taken_out_for_a_comparison() -> None:
    module = fxprune.trace(nn.Sequential(nn.Linear(3, 4), Always()), frames()).module()
    still = without_dropout(module)
    weight, bias = module.parameters()
    torch.testing.assert_close(still(frames()), functional.linear(frames(), weight, bias))
    assert not torch.equal(module(frames()), module(frames()))
    assert next(still.parameters()) is weight
    quiet = fxprune.trace(nn.Sequential(nn.Linear(3, 4), nn.Dropout()), frames()).module()
    assert without_dropout(quiet) is quiet
