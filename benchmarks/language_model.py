"""A language model of 66 million parameters, shrunk: memory while compiling, speed after.

Vocabulary 10,000, embedding 1,500, two LSTM layers of 1,500, an untied decoder; the layers are cut
to 373 and 315 units. Run it with ``python -m benchmarks.language_model``. The exit code is 1 if a
target is missed.

Memory is measured in a process of its own, from the moment before the call of ``compile``. Speed
is that of the ONNX files in onnxruntime, one thread, batch 1, 35 steps; the dense file is the same
model lowered by fxprune with nothing pruned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import fxprune
from benchmarks.support.lstm import make_model, make_tokens
from benchmarks.support.measuring import Target, conclude, show, single_thread
from benchmarks.support.memory import PeakMemory
from fxprune.contract import Effect, NeuronAnalysis, Pass, PassResult
from fxprune.errors import ConfigError
from fxprune.latency import compare

if TYPE_CHECKING:
    from fxprune.compact import Compact
    from fxprune.contract import Facts
    from fxprune.program import Program

_STEPS = 35
_MEMORY = 1.5  # times the model's bytes
_SPEED = 12.0  # times faster than dense


@dataclass(frozen=True)
class _Sizes:
    """The model, and what is left of its two layers."""

    vocabulary: int = 10_000
    hidden: int = 1_500
    units: tuple[int, int] = (373, 315)


_SMALL = _Sizes(vocabulary=200, hidden=60, units=(15, 13))


@dataclass(frozen=True)
class KeepUnits(Pass):
    """Cuts recurrent layers down to given sizes, keeping units at equal distances.

    Attributes:
        units: how many units to keep in each recurrent group, in order.
    """

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})

    units: tuple[int, ...] = ()

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Adds the other units to the neurons that are cut."""
        groups = [g for g in facts[NeuronAnalysis].groups if g.recurrent]
        if len(groups) != len(self.units):
            raise ConfigError(f"{len(self.units)} sizes for {len(groups)} recurrent layers")
        masks = program.masks
        for group, left in zip(groups, self.units, strict=True):
            goes = torch.ones(group.size, dtype=torch.bool)
            goes[torch.arange(left) * group.size // left] = False
            masks = masks.cut_neurons(group.neurons[goes])
        return PassResult(replace(program, masks=masks), changed=True)


def _compile(sizes: _Sizes, *passes: Pass) -> tuple[nn.Module, Compact]:
    model = make_model(sizes.vocabulary, sizes.hidden)
    return model, fxprune.compile(model, passes, example_inputs=_tokens(sizes), progress=False)


def _tokens(sizes: _Sizes) -> Tensor:
    return make_tokens(sizes.vocabulary, _STEPS, 1)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# Memory -----------------------------------------------------------------------------------------


def _measure_memory(sizes: _Sizes) -> None:
    """Prints the model's bytes and by how much compiling it raised the resident memory."""
    model, tokens = make_model(sizes.vocabulary, sizes.hidden), _tokens(sizes)
    watch = PeakMemory()
    start = time.perf_counter()
    fxprune.compile(model, KeepUnits(sizes.units), example_inputs=tokens, progress=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"model": _bytes(model), "raised": watch.stop(), "seconds": seconds}))


def _memory(small: bool) -> Target:
    command = [sys.executable, "-m", "benchmarks.language_model", "--memory-only"]
    command += ["--small"] if small else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    ratio = found["raised"] / found["model"]
    show(
        "Memory",
        ("model bytes", "raised while compiling", "ratio", "compile s"),
        [(found["model"], found["raised"], ratio, found["seconds"])],
    )
    return Target("resident memory raised by compile / bytes of the model", ratio, _MEMORY)


# Speed ------------------------------------------------------------------------------------------


def _speed(sizes: _Sizes) -> Target:
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "dense.onnx", Path(folder) / "compact.onnx"
        _compile(sizes)[1].save_onnx(dense)
        model, compact = _compile(sizes, KeepUnits(sizes.units))
        compact.save_onnx(small)
        report = compact.report
        macs = report.macs_before / report.macs_after
        show(
            "Size",
            ("parameters", "compact", "MACs", "compact", "ratio", "model bytes"),
            [
                (
                    report.parameters_before,
                    report.parameters_after,
                    report.macs_before,
                    report.macs_after,
                    macs,
                    _bytes(model),
                )
            ],
        )
        sizes_of = {"batch": 1, "time": _STEPS}
        found = compare(dense, small, sizes=sizes_of, threads=1)
    print(f"\nSpeed\n\n{found}", flush=True)
    return Target("ONNX: times faster than dense", found.speedup, _SPEED, at_least=True)


def main() -> None:
    """Measures memory and speed and judges both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--memory-only", action="store_true", help="print the memory as JSON")
    given = parser.parse_args()
    single_thread()
    sizes = _SMALL if given.small else _Sizes()
    if given.memory_only:
        _measure_memory(sizes)
        return
    conclude([_memory(given.small), _speed(sizes)])


if __name__ == "__main__":
    main()
