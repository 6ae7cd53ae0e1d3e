"""A language model to prune: its texts, an LSTM of two layers, how it is read and judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

RATE = {"characters": 2e-3, "words": 20.0}
"""The learning rate for either text, see :func:`optimizer`."""

CLIP = {"characters": 1.0, "words": 0.25}
"""The largest norm of a gradient, for either text."""

Batch = tuple[Tensor, Tensor, bool]
"""Tokens and those that follow them, [time, batch], and whether the text begins here."""


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, decoder.

    Args:
        tokens: size of the vocabulary.
        width: of the embedding and of both layers.
        spread: embedding and decoder begin uniform between minus this and this; None for what
            torch begins with, which are embeddings of deviation 1.
    """

    def __init__(self, tokens: int, width: int, spread: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, num_layers=2)
        self.decoder = nn.Linear(width, tokens)
        if spread is not None:
            nn.init.uniform_(self.embedding.weight, -spread, spread)
            nn.init.uniform_(self.decoder.weight, -spread, spread)
            nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score what follows each token.

        Args:
            tokens: [time, batch].
            h: hidden states before the first one, [2, batch, width].
            c: cell states, likewise.

        Returns:
            Logits [time, batch, vocabulary] and the states after the last token.
        """
        y, (h, c) = self.lstm(self.embedding(tokens), (h, c))
        return self.decoder(y), h, c


@dataclass(frozen=True)
class Corpus:
    """A text in token numbers, each part [length], and how many tokens there are."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def read_corpus(data: Path, text: str) -> Corpus:
    """Read a text; characters are split 85 : 5 : 10.

    Raises:
        FileNotFoundError: with the files that ``--data`` must hold.
    """
    if text == "words":
        parts = [
            _read(data / f"ptb/ptb.{part}.txt").replace("\n", " <eos> ").split()
            for part in ("train", "valid", "test")
        ]
    else:
        whole = _read(data / "tinyshakespeare/input.txt")
        first, second = len(whole) * 85 // 100, len(whole) * 90 // 100
        parts = [list(whole[:first]), list(whole[first:second]), list(whole[second:])]
    numbers = {token: i for i, token in enumerate(sorted(set().union(*parts)))}
    train, validation, test = (torch.tensor([numbers[t] for t in part]) for part in parts)
    return Corpus(train, validation, test, len(numbers))


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --data must name a folder that holds tinyshakespeare/input.txt, "
            "or for --words ptb/ptb.train.txt, ptb.valid.txt and ptb.test.txt"
        )
    return path.read_text(encoding="utf-8")


def batches(text: Tensor, batch: int, steps: int) -> list[Batch]:
    """Cut a text into ``batch`` parts that are read side by side, ``steps`` tokens at a time."""
    length = (len(text) - 1) // batch
    tokens = text[: length * batch].reshape(batch, length).t().contiguous()
    targets = text[1 : length * batch + 1].reshape(batch, length).t().contiguous()
    return [
        (tokens[i : i + steps], targets[i : i + steps], i == 0) for i in range(0, length, steps)
    ]


class Reader:
    """Reads batches one after another and carries the states from one to the next.

    ``width`` is that of the model's layers.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._states: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [tokens, vocabulary] and what they should name, [tokens]."""
        tokens, targets, first = batch
        if first or self._states is None:
            zeros = torch.zeros(2, tokens.shape[1], self._width, device=tokens.device)
            self._states = zeros, zeros
        logits, h, c = model(tokens, *self._states)
        self._states = h.detach().float(), c.detach().float()
        return logits.flatten(0, 1).float(), targets.flatten()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy per token of one batch; products are taken in bfloat16 where they can be.

        Weights, their gradients and the optimizer stay in float32.
        """
        device = batch[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=products(device) == "bfloat16"):
            logits, targets = self(model, batch)
        return functional.cross_entropy(logits, targets)


def products(device: str) -> str:
    """The precision that products are taken in while training: "bfloat16" or "float32".

    It is bfloat16 if the device computes in it. A processor that does not (one with AVX2 only) has
    no LSTM in bfloat16 at all.
    """
    if torch.device(device).type == "cuda":
        narrow = torch.cuda.is_bf16_supported()
    else:
        narrow = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if narrow else "float32"


def optimizer(text: str, rate: float, parameters: Any) -> torch.optim.Optimizer:
    """Adam for characters; for words plain steps as published, where Adam learns little."""
    kind = torch.optim.SGD if text == "words" else torch.optim.Adam
    return kind(parameters, lr=rate)


def falling(end: float, steps: int, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """A rate that is constant for half of the steps, then falls to the given fraction of it."""
    return LambdaLR(optimizer, lambda step: end ** max(0.0, 2 * step / steps - 1))


@torch.no_grad()
def judge(model: nn.Module, text: Sequence[Batch], width: int) -> tuple[float, float]:
    """Perplexity, and how many tokens are named first, over a text; in float32."""
    read, loss, right, count = Reader(width), 0.0, 0, 0
    for batch in text:
        logits, targets = read(model, batch)
        loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        right += int((logits.argmax(1) == targets).sum())
        count += len(targets)
    return math.exp(min(loss / count, 700.0)), right / count
