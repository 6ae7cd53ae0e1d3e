"""What it costs to judge a candidate of stage-wise pruning, next to validating the model.

Two LSTM layers of 650 units, batch 20, 35 steps, as many batches as asked. A candidate's masked
weights are computed once, into a buffer that all batches use. Every candidate here differs from
the one before in all of its groups, so nothing of it can be reused. Run it with
``python -m benchmarks.candidate_evaluation``. The exit code is 1 if the target is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import cycle

from torch import Tensor, nn
from torch.nn import functional

import fxprune
from benchmarks.support.lstm import make_model, make_tokens
from benchmarks.support.measuring import (
    Target,
    conclude,
    cpu_seconds,
    medians,
    show,
    single_thread,
)
from fxprune.analysis import Neurons, analyze
from fxprune.masking.insertion import insert_masks
from fxprune.masking.prunable import find_prunable
from fxprune.masking.ratios import ratio_groups
from fxprune.passes._stage_wise_evaluation import Local, Material
from fxprune.policy import protected
from fxprune.program import Program
from fxprune.training import Task, evaluate
from fxprune.weights import owned

_VOCABULARY, _HIDDEN, _STEPS, _BATCH = 2_000, 650, 35, 20
_TARGET = 1.05
_RATIOS = (0.3, 0.6, 0.9)


def main() -> None:
    """Times both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="measured validations of each")
    parser.add_argument("--batches", type=int, default=20, help="batches of a validation")
    options = parser.parse_args()
    single_thread()
    model = make_model(_VOCABULARY, _HIDDEN)
    text = [make_tokens(_VOCABULARY, _STEPS, _BATCH, seed) for seed in range(options.batches)]
    task = _task(text)
    program = fxprune.trace(model, text[0])
    measures: list[Callable[[], object]] = [
        partial(evaluate, model, task, where="the user's model"),
        partial(evaluate, program.module(), task, where="the traced model"),
        _candidates(program, task),
    ]
    taken = medians([partial(cpu_seconds, measure) for measure in measures], options.rounds)
    names = ["the user's model", "traced", "a candidate"]
    show(
        f"One validation, LSTM 2 x 650, batch 20, {options.batches} batches of 35 steps",
        ("what", "s", "times the user's model"),
        [(n, s, s / taken[0]) for n, s in zip(names, taken, strict=True)],
    )
    conclude([Target("a candidate", taken[2] / taken[0], _TARGET)])


def _task(text: list[Tensor]) -> Task:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 0).flatten())

    def validate(model: nn.Module) -> float:
        return sum(float(loss(model, tokens)) for tokens in text) / len(text)

    return Task(loss, text, validate, goal="min")


def _candidates(program: Program, task: Task) -> Callable[[], float]:
    """Judges one candidate after the other."""
    neurons = analyze(program)
    groups = ratio_groups(
        find_prunable(program, neurons, protected(program, neurons, ())),
        ("feedforward", "input", "recurrent"),
    )
    local = Local(partial(_buffer, program, neurons), task)
    local.material = Material.of(program.tensors, groups, {})
    counts = cycle(tuple(group.count(ratio) for group in groups) for ratio in _RATIOS)
    return lambda: local(next(counts))


def _buffer(program: Program, neurons: Neurons) -> nn.Module:
    module: nn.Module = insert_masks(owned(program), neurons).module()
    return module


if __name__ == "__main__":
    main()
