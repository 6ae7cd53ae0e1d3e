"""In train mode a program's module does what the user's does, or refuses; so do its copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError
from fxprune.program import Program
from tests.small import frames


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout1d, (4, 8, 5)),
        (nn.Dropout2d, (4, 8, 5, 3)),
        (nn.Dropout2d, (4, 8)),
        (nn.Dropout3d, (4, 8, 2, 3, 2)),
    ],
)
@pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input")
def test_dropout_of_channels_drops_what_the_model_does(
    layer: Callable[[float], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = layer(0.5), torch.ones(shape)
    module = fxprune.trace(model, x).module().train()
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), expected)
    assert 0 < int((expected == 0).sum()) < x.numel()
    assert torch.equal(module.eval()(x), x)


class Scales(nn.Module):
    """Computes something else in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Doubles or adds."""
        return x * 2 if self.training else x + 3


@pytest.fixture(scope="module")
def scales() -> Program:
    return fxprune.trace(Scales(), frames())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: nn.Sequential(nn.Identity(), m),
        lambda m: fxprune.trace(m, frames()).module(),
    ],
    ids=["deepcopy", "pickle", "part", "trace"],
)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")
def test_copies_refuse_train_mode_too(scales: Program, copied: Any) -> None:
    module = copied(scales.module())
    with pytest.raises(InputError, match=r"in train mode than in eval mode: aten\.add"):
        module.train()
    assert torch.equal(module.eval()(frames()), frames() + 3)
    assert not module.training
