"""Zoo: several recurrent layers, and what stands between them; outputs in other containers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo_model import (
    FEEDFORWARD,
    Output,
    ZooModel,
    features,
    plain,
    rnn,
)

# ---------------------------------------------------------------------- layers after one another


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.first = nn.LSTM(8, 8, batch_first=True)
        self.second = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        x = self.stem(x)
        x = x + self.first(x)[0]
        x = x + self.second(x)[0]
        return self.head(x)


class Dense(nn.Module):
    """Every layer reads all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(5, 6, batch_first=True)
        self.second = nn.GRU(5 + 6, 7, batch_first=True)
        self.head = nn.Linear(5 + 6 + 7, 3)

    def forward(self, x: Tensor) -> Output:
        x = torch.cat([x, self.first(x)[0]], dim=-1)
        x = torch.cat([x, self.second(x)[0]], dim=-1)
        return self.head(x)


class Gated(nn.Module):
    """One layer gates another, and a linear layer gates the product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.GRU(5, 8, batch_first=True)
        self.value = nn.GRU(5, 8, batch_first=True)
        self.output_gate = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Output:
        y = torch.sigmoid(self.gate(x)[0]) * self.value(x)[0]
        return self.head(y * torch.sigmoid(self.output_gate(x)))


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.second = nn.LSTM(8, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Output:
        return self.head(self.second(self.norm(self.first(x)[0]))[0])


class AttentionBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(5, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
        self.second = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Output:
        x, _ = self.first(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.second(x)[0])


class FlippedPair(nn.Module):
    """Two directions as two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = nn.GRU(5, 6, batch_first=True)
        self.backwards = nn.GRU(5, 7, batch_first=True)
        self.head = nn.Linear(6 + 7, 3)

    def forward(self, x: Tensor) -> Output:
        backwards = self.backwards(x.flip(1))[0].flip(1)
        return self.head(torch.cat([self.forwards(x)[0], backwards], dim=-1))


class Grouped(nn.Module):
    """Grouped recurrence: one GRU per chunk of channels, and a shuffle between two such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 12)
        self.first = nn.ModuleList(nn.GRU(4, 6, batch_first=True) for _ in range(3))
        self.second = nn.ModuleList(nn.GRU(6, 4, batch_first=True) for _ in range(3))
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Output:
        parts = torch.chunk(self.stem(x), 3, dim=-1)
        x = torch.cat([gru(part)[0] for gru, part in zip(self.first, parts, strict=True)], dim=-1)
        batch, time, _ = x.shape
        x = x.view(batch, time, 3, 6).transpose(2, 3).reshape(batch, time, 18)
        parts = torch.chunk(x, 3, dim=-1)
        x = torch.cat([gru(part)[0] for gru, part in zip(self.second, parts, strict=True)], dim=-1)
        return self.head(x)


class GroupsAsBatch(nn.Module):
    """One GRU serves every group: the groups move into the batch and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.gru = nn.GRU(4, 7, batch_first=True)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Output:
        batch, time, _ = x.shape
        x = self.stem(x).view(batch, time, 2, 4).permute(0, 2, 1, 3)  # [batch, 2, time, 4]
        x, _ = self.gru(x.reshape(batch * 2, time, 4))
        x = x.view(batch, 2, time, 7).permute(0, 2, 1, 3).reshape(batch, time, 14)
        return self.head(x)


def parts(name: str, count: int) -> tuple[str, ...]:
    """Names of the modules of a ``ModuleList``."""
    return tuple(f"{name}.{k}" for k in range(count))


LAYERED = (
    ZooModel(
        "residual-lstms",
        Residual,
        features(5),
        plain("stem") | rnn("first") | rnn("second") | plain("head"),
        notes="the sums tie the stem's units to both layers', yet they reach them by weight_ih",
    ),
    ZooModel("dense-grus", Dense, features(5), rnn("first") | rnn("second") | plain("head")),
    ZooModel(
        "gated-grus",
        Gated,
        features(5),
        rnn("gate") | rnn("value") | plain("output_gate", "head"),
    ),
    ZooModel(
        "normalized-lstms",
        Normalized,
        features(5),
        rnn("first") | rnn("second") | plain("head"),
    ),
    ZooModel(
        "attention-between-lstms",
        AttentionBetween,
        features(5),
        rnn("first")
        | {"attention.in_proj_weight": FEEDFORWARD, "attention.out_proj.weight": FEEDFORWARD}
        | rnn("second")
        | plain("head"),
    ),
    ZooModel(
        "flipped-gru-pair",
        FlippedPair,
        features(5),
        rnn("forwards") | rnn("backwards") | plain("head"),
    ),
    ZooModel(
        "grouped-grus",
        Grouped,
        features(5),
        {
            name: kinds
            for part in (*parts("first", 3), *parts("second", 3))
            for name, kinds in rnn(part).items()
        }
        | plain("stem", "head"),
    ),
    ZooModel(
        "groups-as-batch",
        GroupsAsBatch,
        features(5),
        plain("stem") | rnn("gru") | plain("head"),
        notes="both halves of the stem feed the same columns of weight_ih",
    ),
)

# ---------------------------------------------------------------------------------------- outputs


class Heads(nn.Module):
    """Two heads, and a choice of the container for what they give."""

    def __init__(self, container: str) -> None:
        super().__init__()
        self.container = container
        self.gru = nn.GRU(5, 8, batch_first=True)
        self.left = nn.Linear(8, 3)
        self.right = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Output:
        y, h_n = self.gru(x)
        left, right = self.left(y), self.right(y[:, -1])
        if self.container == "dict":
            return {"steps": left, "label": right, "state": h_n}
        if self.container == "nested":
            return [left, (right, None)]
        return left, right


OUTPUTS = tuple(
    ZooModel(
        f"{container}-output",
        lambda container=container: Heads(container),  # type: ignore[misc]
        features(5),
        rnn("gru") | plain("left", "right"),
    )
    for container in ("dict", "nested")
)

GRAPHS = LAYERED + OUTPUTS
