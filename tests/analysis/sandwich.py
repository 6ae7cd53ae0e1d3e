"""A model around one operation, some such operations, and what the analysis says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fxprune
from fxprune.analysis import Neurons, analyze
from fxprune.passes import Magnitude
from tests.small import frames

__all__ = [
    "Operation",
    "Sandwich",
    "Shaped",
    "Shared",
    "Turned",
    "check_exact",
    "free_neurons",
    "neurons_of",
]

Operation = Callable[[Tensor], Tensor]

WIDTH = 8


class Sandwich(nn.Module):
    """Linear to 8 features, an operation on [batch, 4, 8], Linear from ``width`` to 2."""

    def __init__(self, operation: Operation | nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.operation = operation
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 4, 3] to [..., 2]."""
        y: Tensor = self.head(self.operation(self.stem(x)))
        return y


class Shared(nn.Module):
    """Four heads of queries, two of keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends to the first half of the features."""
        queries, keys = x.unflatten(-1, (4, 2)), x[..., :4].unflatten(-1, (2, 2))
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        y = functional.scaled_dot_product_attention(queries, keys, keys, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


class Shaped(nn.Module):
    """Gets the shape of a value of other neurons, and is multiplied by the mean of those.

    Args:
        shape: gives a value the shape of another.
    """

    def __init__(self, shape: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.other, self.shape = nn.Linear(8, 8), shape

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 4, 8] to the same."""
        other = self.other(x)
        y: Tensor = self.shape(x, other) * other.mean(-1, keepdim=True)
        return y


class Turned(nn.Module):
    """Multiplies by a weight that was turned.

    Args:
        turn: exchanges two dimensions.
    """

    def __init__(self, turn: Operation) -> None:
        super().__init__()
        self.weight, self.turn = nn.Parameter(torch.randn(5, 8)), turn

    def forward(self, x: Tensor) -> Tensor:
        """Maps 8 to 5."""
        y: Tensor = x @ self.turn(self.weight)
        return y


def neurons_of(model: nn.Module, *inputs: Any) -> Neurons:
    """The analysis of a model at these inputs, [2, 4, 3] by default."""
    return analyze(fxprune.trace(model.eval(), inputs or (frames(2, 4),)))


def free_neurons(neurons: Neurons, weight: str = "stem.weight") -> int:
    """How many of the neurons that a weight produces may be removed."""
    block = next(b for b in neurons.blocks if b.weight == weight)
    produced = block.destinations[block.destinations >= 0].unique()
    return int(neurons.free[produced].sum())


def check_exact(model: nn.Module, *inputs: Any, sparsity: float = 0.5) -> fxprune.Compact:
    """Prunes neurons, and compares compact and masked program at double precision."""
    inputs = inputs or (frames(2, 4),)
    wide = pytree.tree_map_only(Tensor, _wide, inputs)
    compact = fxprune.compile(
        model.double().eval(), Magnitude(sparsity), example_inputs=wide, progress=False
    )
    masked, small = compact.masked(*wide), compact.module(*wide)
    for a, b in zip(pytree.tree_leaves(masked), pytree.tree_leaves(small), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return compact


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
