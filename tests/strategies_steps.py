"""The operations that random models are made of: how each is made, and how it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MAKERS", "POINTWISE", "RUNNERS", "Options"]

Options = Mapping[str, Any]
Maker = Callable[[list[Tensor], Options], nn.Module | None]
Runner = Callable[[Any, list[Tensor], Options], list[Tensor]]

RECURRENT: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


def make_recurrent(kind: str) -> Maker:
    def make(inputs: list[Tensor], options: Options) -> nn.Module:
        hidden = int(options["hidden"])
        extra = {"proj_size": hidden // 2} if options.get("projection") and hidden > 1 else {}
        return RECURRENT[kind](
            inputs[0].shape[-1],
            hidden,
            num_layers=options["layers"],
            bidirectional=options["both"],
            bias=options["bias"],
            batch_first=True,
            **extra,
        )

    return make


def run_recurrent(part: nn.RNNBase, inputs: list[Tensor], options: Options) -> list[Tensor]:
    """The outputs and, read in one of several ways, the final states as a vector."""
    outputs, state = part(inputs[0])
    h_n, c_n = state if isinstance(state, tuple) else (state, state)
    return [outputs, *_read_states(h_n, c_n, options)]


def _read_states(h_n: Tensor, c_n: Tensor, options: Options) -> list[Tensor]:
    layers, batch = h_n.shape[0], h_n.shape[1]
    read = options["read"]
    if read == "last":
        return [h_n[-1]]
    if read == "cat":
        return [torch.cat([h_n[0], h_n[-1]], dim=-1)]
    if read == "flat":
        return [h_n.transpose(0, 1).reshape(batch, -1)]
    if read == "sum":
        return [h_n.sum(dim=0)]
    if read == "view":
        directions = 2 if options["both"] else 1
        return [h_n.view(layers // directions, directions, batch, -1)[-1].mean(dim=0)]
    if read == "cell":
        return [c_n[-1]]
    return []


def make_conv(inputs: list[Tensor], options: Options) -> nn.Module:
    groups, width = int(options["groups"]), inputs[0].shape[-1]
    outputs = groups * int(options["width"])
    return nn.Conv1d(width, outputs, 3, padding=1, groups=groups)


def run_conv(part: nn.Module, inputs: list[Tensor], options: Options) -> list[Tensor]:
    return [part(inputs[0].transpose(1, 2)).transpose(1, 2)]


def run_batch_norm(part: nn.Module, inputs: list[Tensor], options: Options) -> list[Tensor]:
    x = inputs[0]
    return [part(x)] if x.dim() == 2 else [part(x.transpose(1, 2)).transpose(1, 2)]


def run_cells(part: Any, inputs: list[Tensor], options: Options) -> list[Tensor]:
    """A cell on the same vector three times."""
    h = part(inputs[0])
    for _ in range(2):
        h = part(inputs[0], h)
    return [h[0], h[1]] if isinstance(h, tuple) else [h]


def make_heads(inputs: list[Tensor], options: Options) -> nn.Module | None:
    size = inputs[0].shape[-1] // 2
    return nn.Linear(size, size) if options["use"] == "linear" else None


def run_heads(part: nn.Module, inputs: list[Tensor], options: Options) -> list[Tensor]:
    """Splits the features into two heads, works on each, and joins them."""
    x = inputs[0]
    batch, time, width = x.shape
    heads = x.view(batch, time, 2, width // 2).transpose(1, 2)  # [batch, 2, time, width / 2]
    use = options["use"]
    if use == "attention":
        heads = F.scaled_dot_product_attention(heads, heads, heads)
    elif use == "linear":
        heads = part(heads)
    elif use == "scale":
        heads = heads * torch.sigmoid(heads)
    elif use == "mean":
        heads = heads - heads.mean(dim=2, keepdim=True)
    else:
        heads = heads.flip(1)
    return [heads.transpose(1, 2).reshape(batch, time, width)]


def run_groups_as_batch(part: Any, inputs: list[Tensor], options: Options) -> list[Tensor]:
    """One recurrent layer for every half of the features."""
    x = inputs[0]
    batch, time, width = x.shape
    x = x.view(batch, time, 2, width // 2).permute(0, 2, 1, 3).reshape(-1, time, width // 2)
    y = part(x)[0]
    y = y.view(batch, 2, time, y.shape[-1]).permute(0, 2, 1, 3)
    return [y.reshape(batch, time, -1)]


def run_shuffle(part: nn.Module, inputs: list[Tensor], options: Options) -> list[Tensor]:
    x = inputs[0]
    lead = x.shape[:-1]
    return [x.reshape(*lead, 2, x.shape[-1] // 2).transpose(-1, -2).reshape(*lead, x.shape[-1])]


class FromState(nn.Module):
    """A GRU whose initial state a linear layer computes from a vector."""

    def __init__(self, width: int, vector: int, hidden: int) -> None:
        super().__init__()
        self.start = nn.Linear(vector, hidden)
        self.gru = nn.GRU(width, hidden, batch_first=True)

    def forward(self, x: Tensor, vector: Tensor) -> Any:
        y, h_n = self.gru(x, torch.tanh(self.start(vector)).unsqueeze(0))
        return [y, h_n.squeeze(0)]


class Broadcast(nn.Module):
    """Adds a projected vector to every step of a sequence."""

    def __init__(self, width: int, vector: int) -> None:
        super().__init__()
        self.project = nn.Linear(vector, width)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        moved: Tensor = x + self.project(vector).unsqueeze(1)
        return moved


class AttentionPool(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.softmax(self.score(torch.tanh(x)), dim=1) * x).sum(dim=1)


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "exp": lambda x: torch.exp(torch.tanh(x)),  # bounded: deep stacks stay in range
}


def run_pool(part: nn.Module, inputs: list[Tensor], options: Options) -> list[Tensor]:
    x = inputs[0].transpose(1, 2)
    pool = F.max_pool1d if options["function"] == "max" else F.avg_pool1d
    return [pool(x, 3, stride=1, padding=1).transpose(1, 2)]


def run_chunk(part: nn.Module, inputs: list[Tensor], options: Options) -> list[Tensor]:
    at = int(options["at"])
    return list(inputs[0].split([at, inputs[0].shape[-1] - at], dim=-1))


def width_of(inputs: list[Tensor]) -> int:
    return inputs[0].shape[-1]


MAKERS: dict[str, Maker] = {
    "lstm": make_recurrent("lstm"),
    "gru": make_recurrent("gru"),
    "rnn": make_recurrent("rnn"),
    "conv": make_conv,
    "heads": make_heads,
    "linear": lambda x, o: nn.Linear(width_of(x), o["width"], bias=o["bias"]),
    "layer-norm": lambda x, o: nn.LayerNorm(width_of(x)),
    "batch-norm": lambda x, o: nn.BatchNorm1d(width_of(x)),
    "group-norm": lambda x, o: nn.GroupNorm(1 + (width_of(x) in (4, 6)), width_of(x)),
    "cells": lambda x, o: CELLS[o["cell"]](width_of(x), o["hidden"]),
    "groups-as-batch": lambda x, o: nn.GRU(width_of(x) // 2, o["hidden"], batch_first=True),
    "gru-from-state": lambda x, o: FromState(width_of(x), x[1].shape[-1], o["hidden"]),
    "broadcast": lambda x, o: Broadcast(width_of(x), x[1].shape[-1]),
    "attention-pool": lambda x, o: AttentionPool(width_of(x)),
    **dict.fromkeys(
        """pointwise glu chunk slice cat add multiply stack shuffle flip delay last mean-time
        max-time centre pool""".split(),
        lambda x, o: None,
    ),
}

RUNNERS: dict[str, Runner] = {
    **dict.fromkeys(("lstm", "gru", "rnn"), run_recurrent),
    "conv": run_conv,
    "heads": run_heads,
    "batch-norm": run_batch_norm,
    "group-norm": run_conv,  # channels in the middle, as for a convolution
    "cells": run_cells,
    "groups-as-batch": run_groups_as_batch,
    "gru-from-state": lambda part, x, o: list(part(*x)),
    "shuffle": run_shuffle,
    "pool": run_pool,
    "chunk": run_chunk,
    **dict.fromkeys(
        ("linear", "layer-norm", "broadcast", "attention-pool"), lambda part, x, o: [part(*x)]
    ),
    "pointwise": lambda part, x, o: [POINTWISE[o["function"]](x[0])],
    "glu": lambda part, x, o: [F.glu(x[0], dim=-1)],
    "slice": lambda part, x, o: [x[0][..., o["start"] : o["stop"]]],
    "cat": lambda part, x, o: [torch.cat(x, dim=-1)],
    "add": lambda part, x, o: [x[0] + x[1]],
    "multiply": lambda part, x, o: [torch.tanh(x[0]) * torch.tanh(x[1])],
    "stack": lambda part, x, o: [torch.stack(x).mean(dim=0)],
    "flip": lambda part, x, o: [x[0].flip(1)],
    "delay": lambda part, x, o: [F.pad(x[0], (0, 0, 1, 0))[:, :-1]],
    "last": lambda part, x, o: [x[0][:, -1]],
    "mean-time": lambda part, x, o: [x[0].mean(dim=1)],
    "max-time": lambda part, x, o: [x[0].amax(dim=1)],
    "centre": lambda part, x, o: [x[0] - x[0].mean(dim=-1, keepdim=True)],
}
