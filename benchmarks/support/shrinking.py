"""Tracing, analysing and shrinking a model to half its neurons, one stage at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.support.measuring import cpu_seconds
from fxprune.analysis import Neurons, analyze
from fxprune.masking.masks import Masks
from fxprune.shrinking.compact import compact_program
from fxprune.tracing.tracer import trace

if TYPE_CHECKING:
    from torch import nn

    from fxprune.program import Program

__all__ = ["Subject"]


class Subject:
    """A traced model of which half the neurons of every group are cut.

    Attributes:
        tracing: CPU seconds that tracing took.
        weights: number of parameters.
        program: the traced program.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        traced: list[Program] = []
        self.tracing = cpu_seconds(lambda: traced.append(trace(model, example)))
        self.weights = sum(p.numel() for p in model.parameters())
        self.program = traced[0]
        self.masked = replace(self.program, masks=_half(analyze(self.program)))

    def analysis(self) -> float:
        """CPU seconds of one analysis."""
        return cpu_seconds(lambda: analyze(self.program))

    def shrinking(self) -> float:
        """CPU seconds of one analysis and one shrinking."""
        return cpu_seconds(lambda: compact_program(self.masked, analyze(self.masked)))


def _half(neurons: Neurons) -> Masks:
    cut = [g.neurons[g.free] for g in neurons.groups]
    return Masks(neurons=torch.cat([ids[: len(ids) // 2] for ids in cut]).sort().values)
