"""Small models that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxprune.passes import Magnitude

__all__ = ["HALF", "PackedTagger", "Tagger", "TiedModel", "frames", "tensors_of"]

HALF = Magnitude(0.5)
"""Removes every second neuron that may go."""


class Tagger(nn.Module):
    """Linear, a recurrent layer, Linear: [batch, time, 3] to [batch, time, 2]."""

    def __init__(self, layer: type[nn.RNNBase] = nn.GRU, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.rnn: nn.Module = layer(5, 6, batch_first=True, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(12 if options.get("bidirectional") else 6, 2)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        """Returns the tags, and the final state where an initial one is given."""
        y, final = self.rnn(torch.relu(self.stem(x)), state)
        return self.head(y) if state is None else (self.head(y), final)


class PackedTagger(nn.Module):
    """A bidirectional LSTM over packed sequences."""

    def __init__(self, sorted_: bool = False, **unpacking: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 2)
        self.sorted, self.unpacking = sorted_, unpacking

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns tags, lengths and the final state."""
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.sorted)
        y, (h, _) = self.rnn(packed)
        y, lengths = pad_packed_sequence(y, batch_first=True, **self.unpacking)
        return self.head(y), lengths, h


class TiedModel(nn.Module):
    """A language model whose decoder is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [batch, time] to [batch, time, 11]."""
        y: Tensor = self.decoder(self.rnn(self.embedding(tokens))[0])
        return y


def frames(batch: int = 2, time: int = 5, size: int = 3) -> Tensor:
    """Random input, the same at every call."""
    return torch.randn(batch, time, size, generator=torch.Generator().manual_seed(1))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
