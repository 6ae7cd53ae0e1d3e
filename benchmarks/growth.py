"""How the time of analysis and shrinking grows with depth, weights and sequence length.

Run it with ``python -m benchmarks.growth``; ``--limit 200`` stops at that depth. The exit code is
1 if a target is missed.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

from torch import nn

from benchmarks.support.measuring import Target, conclude, medians, show, single_thread
from benchmarks.support.models import FAMILIES, recurrent
from benchmarks.support.shrinking import Subject

_DEEP = (100, 200, 400, 800, 1600)
_DEPTHS = {
    "MLP": _DEEP,
    "conv-batchnorm": _DEEP,
    "residual": _DEEP,
    "stacked LSTM": (25, 50, 100, 200),
    "dense concatenation": (20, 40, 80, 160),
}
_TIMES = (25, 50, 100, 200, 400)
_PER_DOUBLING = 2.3
_OVER_WEIGHTS = 1.2
_OVER_TIME = 1.3  # what equal work may differ by when it is timed
_ROUNDS = 5


def main() -> None:
    """Measures every family and judges the growth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=max(_DEEP), help="largest depth")
    limit = parser.parse_args().limit
    single_thread()
    targets: list[Target] = []
    for family, depths in _DEPTHS.items():
        targets += _grow(family, [d for d in depths if d <= limit])
    for layer in (nn.LSTM, nn.GRU):
        targets += _lengthen(layer)
    conclude(targets)


def _grow(family: str, depths: list[int]) -> list[Target]:
    """Times a family at every depth, in turns."""
    start = time.process_time()
    subjects = [Subject(*FAMILIES[family](depth)) for depth in depths]
    print(f"{family}: traced in {time.process_time() - start:.0f} s", flush=True)
    analysis = medians([s.analysis for s in subjects], _ROUNDS)
    both = medians([s.shrinking for s in subjects], _ROUNDS)
    allowed = [_PER_DOUBLING] * len(depths)
    if family == "dense concatenation":  # its weights grow quadratically themselves
        allowed = [1.0, *(_OVER_WEIGHTS * b.weights / a.weights for a, b in pairwise(subjects))]
    growth = [None, *(b / a for a, b in pairwise(both))]
    show(
        family,
        (
            "depth",
            "weights",
            "nodes",
            "trace s",
            "analysis s",
            "analysis + shrink s",
            "growth",
            "at most",
            "total s",
        ),
        [
            (
                d,
                s.weights,
                len(s.program.graph.nodes),
                s.tracing,
                a,
                b,
                g,
                g and limit,
                s.tracing + b,
            )
            for d, s, a, b, g, limit in zip(
                depths, subjects, analysis, both, growth, allowed, strict=True
            )
        ],
    )
    return [
        Target(f"{family} {d // 2} -> {d}: analysis + shrink grows", g, limit)
        for d, g, limit in zip(depths, growth, allowed, strict=True)
        if g is not None
    ]


def _lengthen(layer: type[nn.RNNBase]) -> list[Target]:
    """Times four recurrent layers on sequences of growing length."""
    subjects = [Subject(*recurrent(layer, 4, time=steps)) for steps in _TIMES]
    both = medians([s.shrinking for s in subjects], 3 * _ROUNDS)
    nodes = [len(s.program.graph.nodes) for s in subjects]
    name = f"4 x {layer.__name__}"
    show(
        f"{name}, sequence length",
        ("steps", "nodes", "trace s", "analysis + shrink s", "total s"),
        [
            (t, n, s.tracing, b, s.tracing + b)
            for t, n, s, b in zip(_TIMES, nodes, subjects, both, strict=True)
        ],
    )
    return [
        Target(f"{name}: nodes at {_TIMES[-1]} steps / {_TIMES[0]}", nodes[-1] / nodes[0], 1.0),
        Target(f"{name}: slowest / fastest length", max(both) / min(both), _OVER_TIME),
    ]


if __name__ == "__main__":
    main()
