"""One operation between two layers: how many of its 8 neurons may go, and exactly so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.analysis import analyze
from fxprune.shrinking.liveness import alive_neurons
from tests.analysis.sandwich import (
    Operation,
    Sandwich,
    Shaped,
    Shared,
    Turned,
    check_exact,
    free_neurons,
    neurons_of,
)
from tests.small import frames

Case = tuple[Operation | nn.Module, int, int]  # operation, features it returns, neurons free of 8


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, 4)


def images(*layers: nn.Module) -> nn.Module:
    """Layers over [batch * 4, 8, 1, 1]."""
    into = (nn.Unflatten(2, (8, 1, 1)), nn.Flatten(0, 1))
    return nn.Sequential(*into, *layers, nn.Flatten(1))


def rows(*layers: nn.Module) -> nn.Module:
    """Layers over [batch * 4, 8]."""
    return nn.Sequential(nn.Flatten(0, 1), *layers)


class Weighted(nn.Module):
    """Contracts with a parameter by einsum.

    Args:
        equation: of it.
    """

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Maps 8 to 5."""
        return torch.einsum(self.equation, x, self.weight)


class Biaffine(nn.Module):
    """Every step against every step, by three operands: a score each, or one for each label.

    Args:
        equation: of an einsum of both views of the steps around a weight.
        sizes: of the weight.
    """

    def __init__(self, equation: str, *sizes: int) -> None:
        super().__init__()
        self.equation = equation
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 7)
        self.weight = nn.Parameter(torch.randn(*sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 4, 8] to [batch, 4, 4] or [batch, 4, 4, labels]."""
        left, right = self.left(x).tanh(), self.right(x).tanh()
        return torch.einsum(self.equation, left, self.weight, right)


class Bilinear(nn.Module):
    """Two views of a step, multiplied by ``nn.Bilinear``."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 7)
        self.product = nn.Bilinear(6, 7, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 4, 8] to [batch, 4, 5]."""
        y: Tensor = self.product(self.left(x).tanh(), self.right(x).tanh())
        return y


class Scores(nn.Module):
    """One number for each step, by a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 4, 8] to [batch, 4]."""
        return x.tanh() @ self.vector


class Attention(nn.Module):
    """Two heads of four."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attends to itself."""
        y: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return y


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Gates channels by their means."""
        gate: Tensor = self.up(self.down(x.mean(1)).relu()).sigmoid()
        return x * gate.unsqueeze(1)


POINTWISE: dict[str, Case] = {
    "relu": (torch.relu, 8, 8),
    "gate": (lambda x: x.tanh() * x.sigmoid(), 8, 8),
    "residual": (lambda x: x + x.relu(), 8, 8),
    "numbers": (lambda x: 1 - 2 * x**2, 8, 8),
    "where": (lambda x: torch.where(x > 0, x, -x), 8, 8),
    "masked-fill": (lambda x: x.masked_fill(x < 0, 0.0), 8, 8),
    "comparison": (lambda x: x * ((x > 0) & (x < 1)), 8, 8),
    "add-a-step": (lambda x: x + x[:, :1], 8, 8),
    "add-flipped": (lambda x: x + x.flip(-1), 8, 4),
    "constant-over-time": (lambda x: x + torch.arange(4.0).unsqueeze(1), 8, 8),
    "constant-over-neurons": (lambda x: x * torch.arange(8.0), 8, 0),
    "gated-halves": (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sigmoid(), 4, 4),
    "glu": (lambda x: functional.glu(x, -1), 4, 4),
    "one-slope": (nn.PReLU(), 8, 8),
    "slopes": (rows(nn.PReLU(8)), 8, 8),
    "dropout": (nn.Dropout(), 8, 8),
    "larger": (lambda x: torch.max(*x.chunk(2, -1)), 4, 4),
    "smaller": (lambda x: torch.min(x, -x), 8, 8),
    "noise": (lambda x: x + torch.randn_like(x), 8, 0),
    "noise-of-a-size": (lambda x: x * torch.rand(x.shape), 8, 0),
    "noise-over-time": (lambda x: x * torch.randn(4, 1), 8, 8),
    "sampled": (lambda x: x.sigmoid().bernoulli(), 8, 0),
    "activations": (lambda x: functional.silu(x) * functional.gelu(x) + x.cos(), 8, 8),
}

MOVING: dict[str, Case] = {
    "flip": (lambda x: x.flip(-1), 8, 8),
    "flip-time": (lambda x: x.flip(1), 8, 8),
    "roll": (lambda x: x.roll(1, -1), 8, 0),
    "roll-time": (lambda x: x.roll(1, 1), 8, 8),
    "roll-everything": (lambda x: x.roll(1), 8, 0),
    "windows": (lambda x: x.unfold(1, 2, 1).flatten(2), 16, 8),
    "windows-of-neurons": (lambda x: x.unfold(2, 4, 4).flatten(2), 8, 0),
    "chunk-cat": (lambda x: torch.cat(x.chunk(2, -1), -1), 8, 8),
    "split-cat": (lambda x: torch.cat([x.split([3, 5], -1)[1], x], -1), 13, 8),
    "cat-twice": (lambda x: torch.cat([x, x], -1), 16, 8),
    "cat-time": (lambda x: torch.cat([x, x * 2], 1), 8, 8),
    "cat-ones": (lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1), 9, 7),
    "stack": (lambda x: torch.stack([x, x.relu()], -1).flatten(-2), 16, 8),
    "stack-in-front": (lambda x: torch.stack([x, x.relu()]), 8, 8),
    "swap": (lambda x: x.swapdims(1, 2).tanh().swapaxes(1, 2), 8, 8),
    "view-as": (Shaped(lambda x, other: x.flatten(0, 1).view_as(other)), 8, 8),
    "reshape-as": (Shaped(lambda x, other: x.mT.mT.flatten(0, 1).reshape_as(other)), 8, 8),
    "expand-as": (Shaped(lambda x, other: x[:, :1].expand_as(other)), 8, 8),
    "expand-a-mean-as": (Shaped(lambda x, other: x.mean(2, True).expand_as(other)), 8, 8),
    "unbind-time": (lambda x: torch.stack(x.unbind(1), 1), 8, 8),
    "slice": (lambda x: x[..., 2:-2], 4, 8),
    "slice-from-the-end": (lambda x: x[..., -3:], 3, 8),
    "narrow": (lambda x: x.narrow(-1, 2, 3), 3, 8),
    "narrow-from-the-end": (lambda x: x.narrow(-1, -3, 3), 3, 8),
    "every-other": (lambda x: x[..., ::2], 4, 0),
    "select-kept": (lambda x: x[..., 3:4], 1, 7),
    "index-select": (lambda x: x.index_select(-1, torch.tensor([0, 5])), 2, 8),
    "last-step": (lambda x: x[:, -1], 8, 8),
    "pad-time": (lambda x: functional.pad(x, (0, 0, 1, 2)), 8, 8),
    "pad-neurons": (lambda x: functional.pad(x, (1, 1)), 10, 0),
    "repeat": (lambda x: x.repeat(1, 1, 2), 16, 8),
    "tile": (lambda x: x.tile(2), 16, 8),
    "interleave": (lambda x: x.repeat_interleave(2, -1), 16, 8),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1), 8, 8),
    "heads": (lambda x: (heads(x) * 2).flatten(-2), 8, 4),
    "shuffle": (lambda x: heads(x).transpose(2, 3).flatten(2), 8, 4),
    "time-into-features": (lambda x: x.reshape(x.shape[0], -1), 32, 8),
    "batch-and-time": (lambda x: x.reshape(-1, 8), 8, 8),
    "triangle": (lambda x: x.tril(), 8, 0),
}

REDUCING: dict[str, Case] = {
    "sum": (lambda x: x.sum(-1, keepdim=True), 1, 8),
    "mean": (lambda x: x.mean(-1, keepdim=True), 1, 8),
    "mean-of-all": (lambda x: x.mean((1, 2), keepdim=True), 1, 8),
    "centred": (lambda x: x - x.mean(-1, keepdim=True), 8, 8),
    "gated-by-the-mean": (lambda x: x * x.mean(-1, keepdim=True).sigmoid(), 8, 8),
    "mean-of-everything": (lambda x: x * x.mean(dim=None, keepdim=True), 8, 8),
    "mean-of-no-dimensions": (lambda x: x * x.mean(dim=()), 8, 8),
    "mean-looked-at": (lambda x: x.mean(-1, keepdim=True).expand(-1, -1, 5), 5, 8),
    "sum-of-parts": (lambda x: heads(x).sum(2), 4, 4),
    "mean-of-parts": (lambda x: heads(x).mean(2, keepdim=True).flatten(2), 4, 4),
    "mean-of-parts-and-time": (lambda x: heads(x).mean((1, 2)), 4, 4),
    "sum-of-neighbours": (lambda x: x.unflatten(-1, (4, 2)).sum(-1), 4, 4),
    "sum-within-parts": (lambda x: heads(x).sum(3), 2, 2),
    "maxout": (lambda x: heads(x).max(2).values, 4, 4),
    "maxout-of-neighbours": (lambda x: x.unflatten(-1, (4, 2)).amax(-1), 4, 4),
    "norm-of-parts": (lambda x: heads(x).norm(dim=2), 4, 0),
    "mean-over-time": (lambda x: x.mean(1), 8, 8),
    "max-over-time": (lambda x: x.max(1).values, 8, 8),
    "max": (lambda x: x.amax(-1, keepdim=True), 1, 0),
    "norm": (lambda x: functional.normalize(x, dim=-1), 8, 0),
    "norm-of-order-one": (lambda x: functional.normalize(x, p=1, dim=-1), 8, 0),
    "norm-of-order-two": (lambda x: rows()(x) / rows()(x).norm(dim=1, keepdim=True), 8, 0),
    "norm-over-time": (lambda x: functional.normalize(x, dim=1), 8, 8),
    "norm-of-order-two-over-time": (lambda x: x / x.norm(p=2, dim=1, keepdim=True), 8, 8),
    "variance": (lambda x: x.var(-1, keepdim=True), 1, 0),
    "softmax": (lambda x: x.softmax(-1), 8, 0),
    "softmax-over-time": (lambda x: x.softmax(1), 8, 8),
    "cumsum": (lambda x: x.cumsum(-1), 8, 0),
    "cumsum-over-time": (lambda x: x.cumsum(1), 8, 8),
    "sort": (lambda x: x.sort(-1).values, 8, 0),
    "topk": (lambda x: x.topk(2, -1).values, 2, 0),
    "topk-over-time": (lambda x: x.topk(1, 1).values, 8, 8),
    "layer-norm": (nn.LayerNorm(8), 8, 8),
    "plain-layer-norm": (nn.LayerNorm(8, elementwise_affine=False), 8, 8),
    "layer-norm-over-time-too": (nn.LayerNorm((4, 8)), 8, 0),
    "rms-norm": (nn.RMSNorm(8), 8, 8),
    "batch-norm": (rows(nn.BatchNorm1d(8)), 8, 8),
    "group-norm": (rows(nn.GroupNorm(2, 8)), 8, 4),
    "max-pool": (lambda x: functional.max_pool1d(x.transpose(1, 2), 2).transpose(1, 2), 8, 8),
    "pool-over-neurons": (lambda x: functional.avg_pool1d(x, 2), 4, 0),
    "global-pool": (lambda x: functional.adaptive_avg_pool1d(x.mT, 1).flatten(1), 8, 8),
}

CONTRACTION: dict[str, Case] = {
    "linear": (nn.Linear(8, 6), 6, 8),
    "scores": (Scores(), 4, 8),
    "constant-weight": (lambda x: x @ torch.linspace(-1, 1, 40).view(8, 5), 5, 0),
    "products-of-steps": (lambda x: x @ x.transpose(1, 2), 4, 8),
    "products-of-neurons": (lambda x: x.transpose(1, 2) @ x, 8, 0),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x), 8, 8),
    "attention-by-hand": (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x, 8, 8),
    "multi-head": (Attention(), 8, 8),
    "einsum": (lambda x: torch.einsum("btc,bsc->bts", x, x), 4, 8),
    "einsum-weight": (Weighted("btc,cd->btd"), 5, 8),
    "einsum-weight-and-dots": (Weighted("...c,cd->...d"), 5, 8),
    "einsum-dots": (lambda x: torch.einsum("...tc,...sc->...ts", x, x), 4, 8),
    "swapped-weight": (Turned(lambda weight: weight.swapdims(0, 1)), 5, 8),
    "moved-weight": (Turned(lambda weight: weight.movedim(0, 1)), 5, 8),
    "attention-with-shared-keys": (Shared(), 8, 0),
    "biaffine": (Biaffine("bxi,ij,byj->bxy", 6, 7), 4, 8),
    "biaffine-labels": (Biaffine("bxi,ioj,byj->bxyo", 6, 5, 7), 5, 8),
    "bilinear": (Bilinear(bias=True), 5, 8),
    "bilinear-without-bias": (Bilinear(bias=False), 5, 8),
    "excited": (Excited(), 8, 8),
    "conv": (images(nn.Conv2d(8, 8, 1), nn.ReLU()), 8, 8),
    "depthwise": (images(nn.Conv2d(8, 8, 1, groups=8)), 8, 8),
    "depthwise-doubling": (images(nn.Conv2d(8, 16, 1, groups=8)), 16, 8),
    "grouped": (images(nn.Conv2d(8, 8, 1, groups=2)), 8, 4),
    "transposed": (images(nn.ConvTranspose2d(8, 8, 1)), 8, 8),
    "transposed-grouped": (images(nn.ConvTranspose2d(8, 8, 1, groups=2)), 8, 4),
    "no-rule": (lambda x: torch.cdist(x, x), 4, 0),
}

CASES = {**POINTWISE, **MOVING, **REDUCING, **CONTRACTION}


@pytest.mark.parametrize("name", CASES)
def test_which_neurons_may_go(name: str) -> None:
    operation, width, free = CASES[name]
    neurons = neurons_of(Sandwich(operation, width))
    assert free_neurons(neurons) == free


REMOVABLE = [
    name
    for name, (_, _, free) in CASES.items()
    # One makes constants of one precision, and the comparison wants another; one is never equal.
    if free and name not in ("constant-over-time", "noise-over-time")
]


@pytest.mark.parametrize("name", REMOVABLE)
def test_they_go_exactly(name: str) -> None:
    operation, width, _ = CASES[name]
    compact = check_exact(Sandwich(operation, width))
    assert compact.report.parameters_after < compact.report.parameters_before
    assert compact.module.get_parameter("stem.weight").shape[0] < 8


@pytest.mark.parametrize(
    "squeeze", [lambda x: x.squeeze(), lambda x: x.squeeze((1, 3)), lambda x: x.squeeze(-1)]
)
def test_a_dimension_that_shrinks_to_one_neuron_is_not_squeezed(squeeze: Operation) -> None:
    model = Sandwich(lambda x: squeeze(x.unsqueeze(1)).relu())
    compact = check_exact(model, sparsity=0.99)
    assert compact.module.get_parameter("stem.weight").shape[0] == 1
    assert not any(n.args[1:] == ([],) for n in compact.program.graph.nodes)  # ONNX has no such


def test_what_draws_random_numbers_says_so_with_its_place() -> None:
    neurons = neurons_of(Sandwich(lambda x: x + torch.randn_like(x)))
    (refusal,) = neurons.refusals
    assert refusal.reason.startswith("random numbers would be others for fewer neurons, at ")
    assert "sandwich.py:" in refusal.reason


@pytest.mark.parametrize(
    ("operation", "width", "weights"),
    [
        (Bilinear(bias=True), 5, {"left": 6, "right": 7, "product": 5}),
        (Biaffine("bxi,ioj,byj->bxyo", 6, 5, 7), 5, {"left": 6, "right": 7, "operation": 5}),
        (Biaffine("bxi,ij,byj->bxy", 6, 7), 4, {"left": 6, "right": 7}),
    ],
    ids=["bilinear", "biaffine-labels", "biaffine"],
)
def test_both_factors_of_a_bilinear_map_shrink(
    operation: nn.Module, width: int, weights: dict[str, int]
) -> None:
    compact = check_exact(Sandwich(operation, width))
    groups = {g.name.removeprefix("operation."): g.neurons for g in compact.report.groups}
    for name, before in weights.items():
        assert (groups[name].before, groups[name].after) == (before, before - before // 2)


def test_masked_connections_of_a_bilinear_map_free_its_first_factor() -> None:
    model = Sandwich(Bilinear(bias=True), 5)
    program = fxprune.trace(model.eval(), frames(2, 4))
    neurons = analyze(program)
    keep = torch.ones(5, 6, 7, dtype=torch.bool)
    keep[:, 2] = False
    masks = program.masks.cut_connections({"operation.product.weight": keep})
    alive = alive_neurons(neurons, masks)
    dead = (~alive).nonzero().flatten()
    assert dead.tolist() == [int(neurons.group("operation.left").neurons[2])]


def test_what_has_no_rule_says_so_with_its_place() -> None:
    neurons = neurons_of(Sandwich(lambda x: torch.cdist(x, x), 4))
    (refusal,) = neurons.refusals
    assert "cdist" in refusal.reason
    assert "has no rule, at " in refusal.reason
    assert "sandwich.py:" in refusal.reason
    group = next(g for g in neurons.groups if g.name == "stem")
    assert group.frozen
    assert "has no rule" in group.reason


def test_weight_norm_says_how_to_fold_it() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    neurons = neurons_of(Sandwich(layer, 6))
    assert free_neurons(neurons) == 0
    (refusal,) = neurons.refusals
    assert refusal.reason.startswith("weight norm reads whole rows; fold it before compiling: ")
    (kept,) = {g.reason for g in neurons.groups if g.name == "stem"}
    assert "weight that is computed" in kept
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert free_neurons(neurons_of(Sandwich(layer, 6))) == 8
