"""Analysis and shrinking beside torch-pruning's dependency graph and pruner step.

Run it with ``python -m benchmarks.versus_torch_pruning``; it needs the ``bench`` extra. Both cut
half the neurons of every layer but the head of equal models, in turns. What torch-pruning does
between building its graph and the step (it lists all groups once more) is printed, not counted.
The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch_pruning

from benchmarks.support.measuring import Target, conclude, cpu_seconds, medians, show, single_thread
from benchmarks.support.models import FAMILIES
from benchmarks.support.shrinking import Subject

if TYPE_CHECKING:
    from collections.abc import Callable

_LIMITS = {400: 0.5, 800: 0.25}
_CASES = {
    "MLP": _LIMITS,
    "conv-batchnorm": _LIMITS,
    "residual": _LIMITS,
    "dense concatenation": {80: 0.25},
}
_ROUNDS = 3


@dataclass(frozen=True)
class _Peer:
    """torch-pruning at work on one family and depth, every time on a fresh model."""

    family: str
    depth: int

    def build(self) -> float:
        """CPU seconds of building the dependency graph."""
        model, example = FAMILIES[self.family](self.depth)
        graph = torch_pruning.DependencyGraph()
        return cpu_seconds(lambda: graph.build_dependency(model, example_inputs=example))

    def set_up(self) -> float:
        """CPU seconds of making a pruner, dependency graph included."""
        return self._pruner()[1]

    def step(self) -> float:
        """CPU seconds of scoring and removing half the channels."""
        return cpu_seconds(self._pruner()[0])

    def _pruner(self) -> tuple[Callable[[], None], float]:
        model, example = FAMILIES[self.family](self.depth)
        made = []
        seconds = cpu_seconds(
            lambda: made.append(
                torch_pruning.pruner.MagnitudePruner(
                    model,
                    example,
                    importance=torch_pruning.importance.MagnitudeImportance(p=1),
                    pruning_ratio=0.5,
                    ignored_layers=[list(model.modules())[-1]],
                )
            )
        )
        return made[0].step, seconds


def main() -> None:
    """Measures every case and judges the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=800, help="largest depth")
    limit = parser.parse_args().limit
    single_thread()
    rows: list[tuple[object, ...]] = []
    targets: list[Target] = []
    for family, limits in _CASES.items():
        for depth, allowed in limits.items():
            if depth <= limit:
                row, ratio = _compare(family, depth)
                rows.append(row)
                targets.append(Target(f"{family} {depth}: of torch-pruning's time", ratio, allowed))
                print(f"{family} {depth}: {ratio:.3f}", flush=True)
    show(
        f"CPU seconds, fxprune beside torch-pruning {torch_pruning.__version__}",
        (
            "family",
            "depth",
            "analysis + shrink",
            "trace",
            "total",
            "build",
            "set up",
            "step",
            "build + step",
            "ratio",
        ),
        rows,
    )
    conclude(targets)


def _compare(family: str, depth: int) -> tuple[tuple[object, ...], float]:
    subject, peer = Subject(*FAMILIES[family](depth)), _Peer(family, depth)
    ours, build, set_up, step = medians(
        [subject.shrinking, peer.build, peer.set_up, peer.step], _ROUNDS
    )
    ratio = ours / (build + step)
    total = subject.tracing + ours
    return (
        (family, depth, ours, subject.tracing, total, build, set_up, step, build + step, ratio),
        ratio,
    )


if __name__ == "__main__":
    main()
