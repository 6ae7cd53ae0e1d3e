"""MNIST, small models for it, and how they are trained and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import fxprune

Images = tuple[Tensor, Tensor]
"""Images [n, 1, 28, 28], zero mean and unit variance over the training set, and labels [n]."""

BATCH = 128
HELD_OUT = 2_000  # of the training images, for validation


@dataclass(frozen=True)
class Mnist:
    """The three parts of the data."""

    train: Images
    validation: Images
    test: Images


def read_mnist(data: Path, every: int, held_out: int = HELD_OUT) -> Mnist:
    """Read the images; of those to train on only every so-manyth, but for the last, held out.

    Raises:
        FileNotFoundError: the files are not there; the message says which.
    """
    x, y = _read(data / "mnist" / "mnist_train.npz")
    train = x[:-held_out:every], y[:-held_out:every]
    test = _read(data / "mnist" / "mnist_test.npz")
    return Mnist(train, (x[-held_out:], y[-held_out:]), test)


def _read(path: Path) -> Images:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: put mnist_train.npz and mnist_test.npz there, each with x, uint8 "
            "[n, 28, 28], and y, the digits [n]"
        )
    arrays = np.load(path)
    x = torch.from_numpy(arrays["x"]).float().div(255).sub(0.1307).div(0.3081)
    return x.unsqueeze(1), torch.from_numpy(arrays["y"]).long()


class LeNet5(nn.Module):
    """Two convolutions and three linear layers, with ReLU and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 1, 28, 28] to logits [batch, 10]."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc3(functional.relu(self.fc2(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions with batch norm beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape [batch, channels, height, width]."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(y)))


class SmallResNet(nn.Module):
    """Two stages of two residual blocks, 12 and 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.first = nn.Sequential(Block(12), Block(12))
        self.down = nn.Conv2d(12, 24, 3, stride=2, padding=1)
        self.second = nn.Sequential(Block(24), Block(24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 1, 28, 28] to logits [batch, 10]."""
        x = self.first(functional.relu(self.norm(self.stem(x))))
        x = self.second(functional.relu(self.down(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class RowReader(nn.Module):
    """A recurrent layer that reads an image row by row, and a linear layer on its last output.

    Args:
        kind: ``nn.GRU`` or ``nn.LSTM``.
        units: of the layer.
    """

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], units: int = 64) -> None:
        super().__init__()
        self.rnn = kind(28, units, batch_first=True)
        self.head = nn.Linear(units, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 1, 28, 28] to logits [batch, 10]."""
        outputs, _ = self.rnn(x.squeeze(1))
        return self.head(outputs[:, -1])  # type: ignore[no-any-return]


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "lenet5": LeNet5,
    "gru": lambda: RowReader(nn.GRU),
    "lstm": lambda: RowReader(nn.LSTM),
    "resnet": SmallResNet,
}


@dataclass(frozen=True)
class Shuffled:
    """Batches in an order that is drawn anew for each epoch."""

    images: Images

    def __len__(self) -> int:
        return len(self.images[1]) // BATCH

    def __iter__(self) -> Iterator[Images]:
        x, y = self.images
        order = torch.randperm(len(y))
        for i in range(len(self)):
            rows = order[i * BATCH : (i + 1) * BATCH]
            yield x[rows], y[rows]


def loss(model: nn.Module, batch: Images) -> Tensor:
    """The cross entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """How many images are told right, in percent."""
    model.eval()
    x, y = images
    right = sum(
        int((model(part).argmax(1) == truth).sum())
        for part, truth in zip(x.split(500), y.split(500), strict=True)
    )
    return 100 * right / len(y)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam with a learning rate of 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)


def falling(steps: int, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The rate as it is, but over the last quarter of the steps it falls to 0."""
    return LambdaLR(optimizer, lambda step: max(0.0, min(1.0, 4 * (1 - step / steps))))


def make_task(mnist: Mnist, epochs: int, seed: int, checkpoint: Path | None = None) -> fxprune.Task:
    """Training at a rate that falls in the end, judged by the accuracy on validation images."""
    batches = Shuffled(mnist.train)
    return fxprune.Task(
        loss,
        batches,
        lambda model: accuracy(model, mnist.validation),
        goal="max",
        optimizer=adam,
        scheduler=partial(falling, epochs * len(batches)),
        epochs=epochs,
        checkpoint=checkpoint,
        seed=seed,
    )
