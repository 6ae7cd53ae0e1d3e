"""Terms that masks have made zero vanish, with all that led to them; others stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.compact import Compact
from fxprune.passes import DynamicPruning
from fxprune.shrinking.zeros import drop_zero_terms


class Residual(nn.Module):
    """A branch beside a shortcut, between nothing and a head."""

    def __init__(self, branch: nn.Module, *, minus: bool = False) -> None:
        super().__init__()
        self.branch, self.head, self.minus = branch, nn.Linear(4, 2), minus

    def forward(self, x: Tensor) -> Tensor:
        """Scores [..., 2] of [..., 4]."""
        y = self.branch(x)
        y = y[0] if isinstance(y, tuple) else y
        z: Tensor = self.head(torch.relu(x - y if self.minus else y + x))
        return z


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU())


def normalized() -> nn.Module:
    convolution = nn.Conv1d(4, 4, 3, padding=1, bias=False)
    return nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), convolution, nn.BatchNorm1d(4))


class Channels(Residual):
    """The same over channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Scores [batch, time, 2] of [batch, 4, time]."""
        y = x + self.branch(x)
        z: Tensor = self.head(torch.relu(y).transpose(1, 2))
        return z


LINEAR = ("branch.2.weight",)
GRU = ("branch.weight_ih_l0", "branch.weight_hh_l0")

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "linear": (lambda: Residual(linear()), (2, 4), LINEAR),
    "linear, minus": (lambda: Residual(linear(), minus=True), (2, 4), LINEAR),
    "batch norm": (lambda: Channels(normalized()), (2, 4, 5), LINEAR),
    "gru": (lambda: Residual(nn.GRU(4, 4)), (5, 2, 4), GRU),
    "lstm": (lambda: Residual(nn.LSTM(4, 4)), (5, 2, 4), GRU),
}


def silenced(model: nn.Module) -> nn.Module:
    """Without biases, gains and offsets in the branch."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("branch") and parameter.dim() == 1:
                parameter.zero_()
    return model.eval()


def masked(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> Compact:
    program = fxprune.trace(model, x)
    gone = {n: torch.zeros(program.tensors[n].shape, dtype=torch.bool) for n in names}
    program = replace(program, masks=program.masks.cut_connections(gone))
    return fxprune.compile(program, [], progress=False)


def parameters(compact: Compact) -> set[str]:
    return {name for name, _ in compact.module.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_a_branch_without_connections_is_its_shortcut(case: str) -> None:
    make, shape, names = CASES[case]
    torch.manual_seed(0)
    model, x = silenced(make()), torch.randn(shape)
    compact = masked(model, x, names)
    assert parameters(compact) == {"head.weight", "head.bias"}
    assert compact.report.parameters_after == 10
    y = torch.relu(x.transpose(1, 2) if case == "batch norm" else x)
    assert torch.equal(compact.module(x), model.get_submodule("head")(y))


@pytest.mark.parametrize("case", CASES)
def test_a_bias_is_something(case: str) -> None:
    make, shape, names = CASES[case]
    torch.manual_seed(0)
    compact = masked(make().eval(), torch.randn(shape), names)
    assert parameters(compact) > {"head.weight", "head.bias"}


def test_without_a_gain_a_batch_norm_moves_zero() -> None:
    norm = nn.BatchNorm1d(4, affine=False)
    norm.get_buffer("running_mean").fill_(0.7)
    model = Residual(nn.Sequential(nn.Linear(4, 4, bias=False), norm)).eval()
    x = torch.randn(2, 4)
    compact = masked(model, x, ("branch.0.weight",))
    moved = x - 0.7 / (1 + norm.eps) ** 0.5
    expected = model.head(torch.relu(moved))
    torch.testing.assert_close(compact.module(x), expected, rtol=0, atol=1e-6)


def test_weights_that_are_zero_without_a_mask_stay() -> None:
    model = silenced(Residual(linear()))
    with torch.no_grad():
        model.get_parameter("branch.2.weight").zero_()
    compact = masked(model, torch.randn(2, 4), ())
    assert "branch.0.weight" in parameters(compact)
    assert "branch.2.weight" in parameters(compact)


def test_a_smaller_shortcut_is_not_the_sum() -> None:
    class Spread(Residual):
        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.head(self.branch(x) + x[:1])
            return z

    x = torch.randn(3, 4)
    compact = masked(silenced(Spread(linear())), x, LINEAR)
    assert compact.module(x).shape == (3, 2)
    assert "branch.2.weight" in parameters(compact)


def test_what_else_is_read_stays() -> None:
    class Read(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y, state = self.branch(x)
            return self.head(x + y), state

    x = torch.randn(5, 2, 4)
    compact = masked(silenced(Read(nn.GRU(4, 4))), x, GRU)
    scores, state = compact.module(x)
    assert torch.equal(scores, compact.masked(x)[0])
    assert state.shape == (1, 2, 4)
    assert not state.any()


def test_nothing_silent_is_the_program_itself() -> None:
    program = fxprune.trace(Residual(linear()), torch.randn(2, 4))
    assert drop_zero_terms(program, ()) is program
    assert drop_zero_terms(program, {"branch.0.weight"}) is program


def test_branches_that_learning_drops_are_gone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), *(Shortcut(normalized()) for _ in range(2)), nn.Conv1d(4, 2, 1)
    )
    x, y = torch.randn(8, 3, 6), torch.randn(8, 2, 6)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    task = fxprune.Task(loss, [(x, y)] * 4, lambda m: float(loss(m, (x, y))), "min", epochs=3)
    policy = DynamicPruning(0.5, "depth", every=1)
    compact = fxprune.compile(model, policy, example_inputs=x, task=task, progress=False)
    stays = {name.split(".")[0] for name in parameters(compact)}
    assert len(stays) == 3
    assert {"0", "3"} < stays
    torch.testing.assert_close(compact.module(x), compact.masked(x), rtol=0, atol=1e-6)


class Shortcut(nn.Module):
    """A module and a way around it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        y: Tensor = x + self.inner(x)
        return y
