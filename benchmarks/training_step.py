"""What masks and gates add to a training step of a language model.

Two LSTM layers of 650 units, batch 20, 35 steps. A step is forward, backward, an optimizer step,
and whatever the pass does afterwards. Run it with ``python -m benchmarks.training_step``. The
exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fxprune
from benchmarks.support.lstm import make_model, make_tokens, train_step
from benchmarks.support.measuring import (
    Target,
    conclude,
    cpu_seconds,
    medians,
    show,
    single_thread,
)
from fxprune.contract import Pass
from fxprune.passes import (
    DynamicPruning,
    GradualMagnitude,
    Magnitude,
    NeuronSelection,
    SparseConnectivity,
)

__all__ = ["METHODS"]

_MASKED, _LEARNED = 1.15, 1.2


@dataclass(frozen=True)
class _Sizes:
    vocabulary: int = 2_000
    hidden: int = 650
    steps: int = 35
    batch: int = 20


METHODS: dict[str, tuple[Pass, float]] = {
    "masked connections": (Magnitude(0.9, structure="connection"), _MASKED),
    "masked neurons": (Magnitude(0.5), _MASKED),
    "gradual magnitude": (GradualMagnitude(0.9), _LEARNED),
    "neuron selection": (NeuronSelection(target=0.5), _LEARNED),
    "dynamic pruning": (DynamicPruning(0.9), _LEARNED),
    "sparse connectivity": (SparseConnectivity(target=0.1), _LEARNED),
}
"""Passes, and how many times the user's own a step may take with each."""


def main() -> None:
    """Times a step of every method beside the user's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each method")
    rounds = parser.parse_args().rounds
    single_thread()
    sizes = _Sizes()
    names = ["the user's model", "traced", *METHODS]
    steps = [_plain(sizes), _traced(sizes), *(_prepared(sizes, p) for p, _ in METHODS.values())]
    taken = medians([partial(cpu_seconds, step) for step in steps], rounds)
    ratios = [seconds / taken[0] for seconds in taken]
    show(
        "One training step, LSTM 2 x 650, batch 20, 35 steps",
        ("what", "s", "times the user's model"),
        list(zip(names, taken, ratios, strict=True)),
    )
    limits = [_MASKED, *(limit for _, limit in METHODS.values())]
    targets = [Target(n, r, m) for n, r, m in zip(names[1:], ratios[1:], limits, strict=True)]
    conclude(targets)


def _plain(sizes: _Sizes) -> Callable[[], None]:
    return _step(_model(sizes), sizes)


def _traced(sizes: _Sizes) -> Callable[[], None]:
    return _step(fxprune.trace(_model(sizes), _tokens(sizes)).module(), sizes)


def _prepared(sizes: _Sizes, pass_: Pass) -> Callable[[], None]:
    prepared = fxprune.prepare(_model(sizes), pass_, example_inputs=_tokens(sizes), steps=1000)
    return _step(prepared.module, sizes, prepared)


def _step(
    module: nn.Module, sizes: _Sizes, prepared: fxprune.Prepared | None = None
) -> Callable[[], None]:
    module.train()
    tokens = _tokens(sizes)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return partial(train_step, module, tokens, optimizer, prepared)


def _model(sizes: _Sizes) -> nn.Module:
    return make_model(sizes.vocabulary, sizes.hidden)


def _tokens(sizes: _Sizes) -> Tensor:
    return make_tokens(sizes.vocabulary, sizes.steps, sizes.batch)


if __name__ == "__main__":
    main()
