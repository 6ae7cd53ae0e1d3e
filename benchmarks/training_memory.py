"""How much memory training under masks and gates takes, next to dense training.

Two LSTM layers of 650 units, batch 20, 35 steps, Adam; the model, its traced copy, gradients, the
optimizer's state and what a pass keeps all count. Each method runs in a process of its own, which
has done a small training before, so that what is only loaded once does not count. Run it with
``python -m benchmarks.training_memory``. The exit code is 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

import fxprune
from benchmarks.support.lstm import make_model, make_tokens, train_step
from benchmarks.support.measuring import Target, conclude, show, single_thread
from benchmarks.support.memory import PeakMemory
from benchmarks.training_step import METHODS

_DENSE = "dense"
_TARGET = 2.5
_STEPS = 4


def main() -> None:
    """Measures every method in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=(_DENSE, *METHODS), help="measure here, print bytes")
    only = parser.parse_args().only
    single_thread()
    if only is not None:
        print(json.dumps(_measure(only)))
        return
    names = [_DENSE, *METHODS]
    taken = [_measure_apart(name) for name in names]
    ratios = [used / taken[0] for used in taken]
    show(
        "Memory of training, LSTM 2 x 650, batch 20, 35 steps, Adam",
        ("what", "bytes", "times dense"),
        list(zip(names, taken, ratios, strict=True)),
    )
    conclude([Target(n, r, _TARGET) for n, r in zip(names[1:], ratios[1:], strict=True)])


def _measure_apart(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.training_memory", "--only", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(output.splitlines()[-1]))


def _measure(name: str) -> int:
    """By how many bytes the resident memory rises."""
    _train(name, vocabulary=20, hidden=8)
    watch = PeakMemory()
    _train(name, vocabulary=2_000, hidden=650)
    return watch.stop()


def _train(name: str, vocabulary: int, hidden: int) -> None:
    """A few steps, by the user's own loop; the masks are rebuilt and learned in them."""
    model, tokens = make_model(vocabulary, hidden), make_tokens(vocabulary, 35, 20)
    prepared, module = None, model
    if name != _DENSE:
        prepared = fxprune.prepare(model, METHODS[name][0], example_inputs=tokens, steps=2 * _STEPS)
        module = prepared.module
    optimizer = torch.optim.Adam(module.parameters())
    for _ in range(_STEPS):
        train_step(module, tokens, optimizer, prepared)


if __name__ == "__main__":
    main()
