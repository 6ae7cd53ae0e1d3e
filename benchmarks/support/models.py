"""Families of models whose depth can be chosen, each with an example input of batch 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FAMILIES", "dense_concatenation", "recurrent"]

Case = tuple[nn.Module, Tensor]

_CLASSES = 10


def multilayer_perceptron(depth: int, width: int = 64) -> Case:
    """``depth`` linear layers with rectifiers between, then a head."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, _CLASSES)), torch.randn(2, width)


def convolutional(depth: int, width: int = 16) -> Case:
    """``depth`` convolutions, each with batch norm and rectifier, then pooling and a head."""
    layers: list[nn.Module] = []
    for index in range(depth):
        inputs = width if index else 3
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU())
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, _CLASSES)]
    return nn.Sequential(*layers, *head), torch.randn(2, 3, 8, 8)


class _ResidualBlock(nn.Module):
    """Two linear layers beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, width] to the same shape."""
        return x + self.outer(torch.relu(self.inner(x)))  # type: ignore[no-any-return]


def residual(depth: int, width: int = 64) -> Case:
    """``depth`` linear layers in residual blocks of two, between a stem and a head."""
    blocks = [_ResidualBlock(width) for _ in range(depth // 2)]
    model = nn.Sequential(nn.Linear(width, width), *blocks, nn.Linear(width, _CLASSES))
    return model, torch.randn(2, width)


class _Recurrent(nn.Module):
    """Recurrent layers one after another, then a linear head on every step."""

    def __init__(self, layer: Callable[..., nn.Module], depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(width, width, batch_first=True) for _ in range(depth))
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, time, width] to [batch, time, classes]."""
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)  # type: ignore[no-any-return]


def recurrent(layer: Callable[..., nn.Module], depth: int, width: int = 16, time: int = 5) -> Case:
    """``depth`` recurrent layers of one kind."""
    return _Recurrent(layer, depth, width), torch.randn(2, time, width)


def stacked_lstm(depth: int) -> Case:
    """``depth`` LSTM layers and a head."""
    return recurrent(nn.LSTM, depth)


class _DenseConcatenation(nn.Module):
    """Every layer reads the outputs of all before it."""

    def __init__(self, depth: int, width: int, growth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width + i * growth, growth) for i in range(depth))
        self.head = nn.Linear(width + depth * growth, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, width] to [batch, classes]."""
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return self.head(x)  # type: ignore[no-any-return]


def dense_concatenation(depth: int, width: int = 16, growth: int = 8) -> Case:
    """``depth`` layers, each of ``growth`` neurons, whose inputs pile up."""
    return _DenseConcatenation(depth, width, growth), torch.randn(2, width)


FAMILIES: dict[str, Callable[[int], Case]] = {
    "MLP": multilayer_perceptron,
    "conv-batchnorm": convolutional,
    "residual": residual,
    "stacked LSTM": stacked_lstm,
    "dense concatenation": dense_concatenation,
}
"""Models by name, from their depth."""
