"""The language model that several benchmarks use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import fxprune

__all__ = ["LanguageModel", "make_model", "make_tokens", "train_step"]


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, decoder.

    Args:
        vocabulary: number of tokens.
        hidden: width of the embedding and of both layers.
    """

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2)
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps [time, batch] to logits [time, batch, vocabulary]."""
        return self.decoder(self.lstm(self.embedding(tokens))[0])  # type: ignore[no-any-return]


def make_model(vocabulary: int, hidden: int) -> nn.Module:
    """The same model each time."""
    torch.manual_seed(0)
    return LanguageModel(vocabulary, hidden)


def make_tokens(vocabulary: int, steps: int, batch: int, seed: int = 0) -> Tensor:
    """The same tokens for the same seed, [steps, batch]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (steps, batch), generator=draw)


def train_step(
    module: nn.Module,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    prepared: fxprune.Prepared | None = None,
) -> None:
    """One step of a user's own loop; ``prepared`` is what the module belongs to, if to any."""
    optimizer.zero_grad()
    logits = module(tokens)
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 0).flatten())
    if prepared is not None:
        loss = loss + prepared.penalty()
    loss.backward()
    optimizer.step()
    if prepared is not None:
        prepared.step()
