"""Zoo: models without recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo_model import (
    FEEDFORWARD,
    Classes,
    Output,
    ZooModel,
    features,
    floats,
    plain,
    settled,
    tokens,
    vectors,
)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5, padding=2)
        self.conv2 = nn.Conv2d(4, 6, 5)
        self.fc1 = nn.Linear(6 * 5 * 5, 12)
        self.fc2 = nn.Linear(12, 11)
        self.fc3 = nn.Linear(11, 10)

    def forward(self, image: Tensor) -> Output:
        x = F.max_pool2d(torch.relu(self.conv1(image)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(torch.relu(self.fc2(x)))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = settled(nn.BatchNorm2d(outputs))
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = settled(nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Output:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResidualCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(6, 6, 1), ResidualBlock(6, 9, 2))
        self.head = nn.Linear(9, 5)

    def forward(self, image: Tensor) -> Output:
        x = self.blocks(torch.relu(self.stem(image)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class TransformerTagger(nn.Module):
    """Learned positions for at most 16 steps, two encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.position = nn.Parameter(torch.randn(1, 16, 8) / 4)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=11, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Output:
        x = self.embedding(words) + self.position[:, : words.shape[1]]
        return self.head(self.encoder(x))


class Mixer(nn.Module):
    """Linear layers over channels and over a fixed time."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.time = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 5))
        self.channels = nn.Sequential(nn.Linear(6, 11), nn.GELU(), nn.Linear(11, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Output:
        x = x + self.time(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(dim=1))


def transformer_rows(*layers: str) -> Classes:
    """Rows of the ``nn.TransformerEncoderLayer`` modules of these names."""
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight")
    return {f"{layer}.{name}": FEEDFORWARD for layer in layers for name in names} | plain(
        *(f"{layer}.linear{k}" for layer in layers for k in (1, 2))
    )


STATELESS = (
    ZooModel(
        "mixer",
        Mixer,
        features(6),
        plain("time.0", "time.2", "channels.0", "channels.2", "head"),
        time_varies=False,
    ),
    ZooModel(
        "mlp",
        lambda: nn.Sequential(
            nn.Linear(5, 9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)
        ),
        vectors(5),
        plain("0", "3", "5"),
        batch=1,
        time_varies=False,
    ),
    ZooModel(
        "single-linear",
        lambda: nn.Linear(5, 3),
        vectors(5),
        {"weight": FEEDFORWARD},
        time_varies=False,
        prunable=False,
        notes="from the model's inputs to its outputs: nothing may be removed",
    ),
    ZooModel(
        "lenet",
        LeNet,
        lambda batch, time: (floats(batch, 1, 28, 28),),
        plain("conv1", "conv2", "fc1", "fc2", "fc3"),
        time_varies=False,
    ),
    ZooModel(
        "residual-cnn",
        ResidualCnn,
        lambda batch, time: (floats(batch, 3, 8, 8),),
        plain("stem", "head")
        | plain(*(f"blocks.{block}.conv{k}" for block in (0, 1) for k in (1, 2)))
        | plain("blocks.1.shortcut"),
        time_varies=False,
    ),
    ZooModel(
        "transformer-tagger",
        TransformerTagger,
        tokens(13),
        plain("embedding", "head") | transformer_rows("encoder.layers.0", "encoder.layers.1"),
        valid_time=lambda time: time <= 16,
    ),
)
