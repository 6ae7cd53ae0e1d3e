"""Plain modules with the compact sizes, and refusals where they cannot have them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fxprune
from fxprune.errors import ConfigError, PreconditionError, VerificationError
from fxprune.passes import Magnitude
from tests.laws import assert_same, other_sizes
from tests.zoo import by_name

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

REBUILT = [
    "gru",
    "bilstm",
    "bigru-two-layer",
    "lstm-projected-two-layer",
    "packed-bilstm-two-layer",
    "lstm-learned-states",
    "gru-cell-loop",
    "tied-projected-lm",
    "conv-transpose-gru",
    "normalized-lstms",
    "two-stage-enhancer",
    "residual-cnn",
]


def compacted(model: nn.Module, inputs: Any, **options: Any) -> fxprune.Compact:
    half = fxprune.Policy((Magnitude(0.5),), **options)
    return fxprune.compile(model, half, example_inputs=inputs, progress=False)


@pytest.mark.parametrize("name", REBUILT)
def test_same_class_smaller_sizes_same_outputs(name: str) -> None:
    torch.manual_seed(0)
    zoo = by_name(name)
    model = zoo.build()
    before = copy.deepcopy(model.state_dict())
    compact = compacted(model, tuple(zoo.inputs(zoo.batch, zoo.time)))
    rebuilt = compact.rebuild(model)

    assert type(rebuilt) is type(model)
    assert sum(p.numel() for p in rebuilt.parameters()) == compact.report.parameters_after
    assert compact.report.parameters_after < compact.report.parameters_before
    for batch, time in [(zoo.batch, zoo.time), *other_sizes(zoo, (zoo.batch, zoo.time))[:2]]:
        assert_same(compact.module, rebuilt, zoo.inputs(batch, time), 1e-5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_layers_know_their_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 6, 1), nn.Conv1d(6, 2, 1))
    rebuilt = compacted(model, torch.zeros(2, 4, 9)).rebuild(model)
    assert "Conv1d(4, 3, kernel_size=(1,), stride=(1,))" in repr(rebuilt)
    zoo = by_name("gru")
    gru = next(m for m in compacted_gru(zoo).modules() if isinstance(m, nn.GRU))
    fresh = nn.GRU(gru.input_size, gru.hidden_size, batch_first=gru.batch_first)
    fresh.load_state_dict(gru.state_dict())


def compacted_gru(zoo: Any) -> nn.Module:
    model = zoo.build()
    return compacted(model, tuple(zoo.inputs(zoo.batch, zoo.time))).rebuild(model)


def test_state_shrinks_with_its_layer() -> None:
    torch.manual_seed(0)
    zoo = by_name("rnn-state-in-out")
    model, inputs = zoo.build(), tuple(zoo.inputs(zoo.batch, zoo.time))
    with pytest.raises(VerificationError, match="Use the compact program"):
        compacted(model, inputs).rebuild(model)
    rebuilt = compacted(model, inputs, states="shrink").rebuild(model)
    assert isinstance(rebuilt, type(model))


def test_unequal_layers_are_refused_by_name() -> None:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 8, num_layers=2)
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])  # type: ignore[no-any-return]

    model = Tagger()
    with torch.no_grad():
        model.rnn.get_parameter("weight_ih_l1").mul_(100)
    uneven = Magnitude(0.5, scope="global")
    compact = fxprune.compile(model, uneven, example_inputs=torch.zeros(5, 2, 4), progress=False)
    with pytest.raises(PreconditionError, match=r"'rnn' would have l0: .*, l1: "):
        compact.rebuild(model)


def test_another_module_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    with pytest.raises(PreconditionError, match="no such tensor"):
        compacted(model, torch.zeros(1, 3)).rebuild(nn.Linear(3, 2))


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.ConvTranspose1d])
@pytest.mark.parametrize(("sparsity", "groups"), [(0.0, 8), (0.5, 4)])
def test_channels_with_several_filters_each(layer: Any, sparsity: float, groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 1), layer(8, 16, 3, groups=8), nn.Conv1d(16, 2, 1))
    x = torch.randn(2, 3, 9)
    compact = fxprune.compile(model, Magnitude(sparsity), example_inputs=x, progress=False)
    rebuilt: Any = compact.rebuild(model)
    depthwise = rebuilt[1]
    sizes = (depthwise.in_channels, depthwise.out_channels, depthwise.groups)
    assert sizes == (groups, 2 * groups, groups)
    assert torch.allclose(rebuilt(x), compact.module(x), atol=1e-6)


class _Normalized(nn.Module):
    """A recurrent layer of which a weight is computed, in one of the ways that torch has."""

    def __init__(self, change: Callable[[nn.Module, str], object]) -> None:
        super().__init__()
        self.stem, self.gru, self.head = nn.Linear(3, 8), nn.GRU(8, 6), nn.Linear(6, 2)
        change(self.gru, "weight_hh_l0")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.stem(x))[0])  # type: ignore[no-any-return]


def test_parametrized_weights() -> None:
    torch.manual_seed(0)
    model = _Normalized(nn.utils.parametrizations.weight_norm)
    x = torch.randn(5, 2, 3)
    compact = compacted(model, x)
    rebuilt: Any = compact.rebuild(model)
    assert rebuilt.gru.input_size == compact.module.get_parameter("stem.weight").shape[0] == 4
    assert torch.allclose(rebuilt(x), compact.module(x), atol=1e-6)


def _prune(module: nn.Module, name: str) -> None:
    prune.l1_unstructured(module, name, 0.3)


def test_modules_that_cannot_be_copied_are_refused() -> None:
    torch.manual_seed(0)
    model = _Normalized(_prune)
    compact = compacted(model, torch.randn(5, 2, 3))
    with pytest.raises(PreconditionError, match=r"copy\.deepcopy cannot copy .* prune\.remove"):
        compact.rebuild(model)
    with pytest.raises(ConfigError, match="a module is rebuilt, not 'x'"):
        compact.rebuild("x")  # type: ignore[arg-type]


def test_weights_trained_further_are_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    compact = compacted(model, torch.zeros(1, 3))
    with torch.no_grad():
        compact.module.get_parameter("1.bias").add_(1.0)
    x = torch.randn(4, 3)
    assert torch.allclose(compact.rebuild(model)(x), compact.module(x), atol=1e-6)
