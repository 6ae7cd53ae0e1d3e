"""Hypothesis strategies: random models from layers and connections between them, random masks.

A model is a list of steps. Each reads earlier values and adds new ones, so any value may be read
again: residuals, concatenations and skipped layers appear by themselves. Values are sequences
[batch, time, width] or vectors [batch, width]; batch and time stay free. A recipe is plain data
and builds the same module every time, so a failing example can be copied into a test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune.analysis import Neurons
from fxprune.masking.masks import Masks
from fxprune.program import Kind, Program
from tests.strategies_steps import MAKERS, POINTWISE, RUNNERS, Options

__all__ = ["MaskPlan", "Net", "Recipe", "Step", "mask_plans", "recipes"]

VOCABULARY = 6
WIDTHS = st.integers(1, 7)


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        kind: a name in ``MAKERS``, or "again": the module of the earlier step ``options["step"]``.
        inputs: indices of the values it reads.
        options: sizes and choices.
    """

    kind: str
    inputs: tuple[int, ...]
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A model as data.

    Attributes:
        width: features of the input sequence; 0 for tokens.
        steps: in execution order.
        heads: values that leave through a linear layer.
        bare: values that leave as they are.
        seed: of the weights.
    """

    width: int
    steps: tuple[Step, ...]
    heads: tuple[int, ...]
    bare: tuple[int, ...] = ()
    seed: int = 0

    def build(self) -> Net:
        """The module in float64 and eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = Net(self.width)
            values = net.values(self.example(2, 3))
            for step in self.steps:
                values += net.add(step, values)
            net.finish([values[i].shape[-1] for i in self.heads], self.heads, self.bare)
        return net.eval()

    def example(self, batch: int, time: int) -> Tensor:
        """An input of that size, always the same."""
        generator = torch.Generator().manual_seed(batch * 100 + time)
        if not self.width:
            return torch.randint(VOCABULARY, (batch, time), generator=generator)
        return torch.randn(batch, time, self.width, generator=generator, dtype=torch.float64)


class Net(nn.Module):
    """Runs the steps of a recipe."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = None if width else nn.Embedding(VOCABULARY, 5).double()
        self.parts = nn.ModuleList()
        self.steps: list[Step] = []

    def add(self, step: Step, values: list[Tensor]) -> list[Tensor]:
        """Makes a step's module and runs it."""
        inputs = [values[i] for i in step.inputs]
        made = None if step.kind == "again" else MAKERS[step.kind](inputs, step.options)
        # A step without weights has a place all the same, so that steps and parts stay in line.
        self.parts.append(nn.Identity() if made is None else settled(made.double()))
        self.steps.append(step)
        with torch.no_grad():
            return self.run(len(self.steps) - 1, values)

    def finish(self, widths: list[int], heads: tuple[int, ...], bare: tuple[int, ...]) -> None:
        """Adds the outputs."""
        self.head_inputs, self.bare = heads, bare
        self.heads = nn.ModuleList(nn.Linear(width, 2).double() for width in widths)

    def values(self, x: Tensor) -> list[Tensor]:
        """What the first step may read."""
        return [x] if self.embedding is None else [self.embedding(x)]

    def run(self, number: int, values: list[Tensor]) -> list[Tensor]:
        """The new values of one step."""
        step = self.steps[number]
        owner = int(step.options["step"]) if step.kind == "again" else number
        inputs = [values[i] for i in step.inputs]
        return RUNNERS[self.steps[owner].kind](self.parts[owner], inputs, self.steps[owner].options)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = self.values(x)
        for number in range(len(self.steps)):
            values += self.run(number, values)
        heads = [h(values[i]) for h, i in zip(self.heads, self.head_inputs, strict=True)]
        return (*heads, *(values[i] for i in self.bare))


def settled(module: nn.Module) -> nn.Module:
    """Recurrent weights of spectral radius at most 1, and batch norms as if trained."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "weight_hh" in name and weight.shape[0] % weight.shape[1] == 0:
                for gate in weight.split(weight.shape[1]):
                    radius = torch.linalg.eigvals(gate).abs().max()
                    gate.div_(radius.clamp(min=1))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.uniform_(-0.5, 0.5)
                part.running_var.uniform_(0.5, 2.0)
            if isinstance(part, (nn.BatchNorm1d, nn.LayerNorm, nn.GroupNorm)):
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.5, 0.5)
    return module


@st.composite
def recipes(draw: st.DrawFn, most: int = 7) -> Recipe:
    """Models of 1 to ``most`` steps."""
    width = draw(st.sampled_from((4, 3, 6, 1, 0)))
    seed = draw(st.integers(0, 2**16))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(width)
        start = (
            torch.randint(VOCABULARY, (2, 3)) if not width else torch.randn(2, 3, width).double()
        )
        values = net.values(start)
        for _ in range(draw(st.integers(1, most))):
            step = draw(_steps(net, values))
            values += net.add(step, values)
    last = len(values) - 1
    heads = draw(st.lists(st.integers(0, last), max_size=2, unique=True))
    bare = draw(st.lists(st.integers(1, last), max_size=1)) if draw(st.booleans()) else []
    return Recipe(width, tuple(net.steps), tuple(dict.fromkeys([last, *heads])), tuple(bare), seed)


@st.composite
def _steps(draw: st.DrawFn, net: Net, values: list[Tensor]) -> Step:
    """A step that the values so far allow; recent values are read more often."""
    count = len(values)
    first = draw(st.one_of(st.just(count - 1), st.integers(0, count - 1)))
    x = values[first]
    kinds = ["linear", "pointwise", "layer-norm", "slice", "centre"]
    kinds += SEQUENCE if x.dim() == 3 else ["cells", "batch-norm"]
    if x.shape[-1] % 2 == 0:
        kinds += ["glu", "shuffle", *(["heads", "groups-as-batch"] if x.dim() == 3 else [])]
    if x.shape[-1] > 1:
        kinds += ["chunk", *(["group-norm"] if x.dim() == 3 else [])]
    same = [i for i, v in enumerate(values) if v.shape == x.shape]
    alike = [i for i, v in enumerate(values) if v.dim() == x.dim()]
    vectors = [i for i, v in enumerate(values) if v.dim() == 2]
    kinds += ["add", "multiply", "cat", "stack"]
    if x.dim() == 3 and vectors:
        kinds += ["broadcast", "gru-from-state"]
    earlier = [
        k for k, s in enumerate(net.steps)
        if s.kind in _REUSABLE and values[s.inputs[0]].shape == x.shape
    ]  # fmt: skip
    if earlier:
        kinds += ["again", "again"]
    kind = draw(st.sampled_from(kinds))
    if kind == "again":
        return Step("again", (first,), {"step": draw(st.sampled_from(earlier))})
    others = {"add": same, "multiply": same, "stack": same, "cat": alike}
    others |= {"broadcast": vectors, "gru-from-state": vectors}
    inputs = (first, draw(st.sampled_from(others[kind]))) if kind in others else (first,)
    options = {name: draw(choice) for name, choice in _options(kind, x.shape[-1]).items()}
    return Step(kind, inputs, options)


SEQUENCE = [
    "lstm", "lstm", "gru", "gru", "rnn", "conv", "conv", "batch-norm", "flip",
    "delay", "last", "mean-time", "max-time", "attention-pool", "pool",
]  # fmt: skip

_REUSABLE = {"linear", "lstm", "gru", "rnn", "conv", "layer-norm", "cells", "heads"}


def _options(kind: str, width: int) -> dict[str, st.SearchStrategy[Any]]:
    """The choices of a step that reads ``width`` features."""
    if kind in ("lstm", "gru", "rnn"):
        options: dict[str, st.SearchStrategy[Any]] = {
            "hidden": WIDTHS,
            "layers": st.integers(1, 2),
            "both": st.booleans(),
            "bias": st.booleans(),
            "read": st.sampled_from(("outputs", "last", "cat", "flat", "sum", "view", "cell")),
        }
        return options | ({"projection": st.booleans()} if kind == "lstm" else {})
    if kind == "conv":
        groups = [g for g in (1, 2, width) if width % g == 0]
        return {"groups": st.sampled_from(groups), "width": st.integers(1, 3)}
    choices: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "linear": {"width": WIDTHS, "bias": st.booleans()},
        "gru-from-state": {"hidden": WIDTHS},
        "cells": {"hidden": WIDTHS, "cell": st.sampled_from(("lstm", "gru", "rnn"))},
        "pointwise": {"function": st.sampled_from(tuple(POINTWISE))},
        "chunk": {"at": st.integers(1, max(1, width - 1))},
        "slice": {"start": st.integers(0, width - 1), "stop": st.integers(width, width)},
        "heads": {"use": st.sampled_from(("attention", "linear", "scale", "mean", "swap"))},
        "groups-as-batch": {"hidden": WIDTHS},
        "pool": {"function": st.sampled_from(("max", "mean"))},
    }
    return choices.get(kind, {})


@dataclass(frozen=True)
class MaskPlan:
    """How to mask whatever program comes.

    Attributes:
        neurons: fraction of the free neurons to cut.
        connections: fraction of the weights' entries to cut.
        lines: fraction of the weights' rows, and of their columns, to cut.
        seed: of the choice.
    """

    neurons: float = 0.0
    connections: float = 0.0
    lines: float = 0.0
    seed: int = 0

    def masks(self, program: Program, neurons: Neurons) -> Masks:
        """The masks of a program."""
        generator = torch.Generator().manual_seed(self.seed)
        free = neurons.free.nonzero().flatten()
        cut = free[torch.rand(len(free), generator=generator) < self.neurons]
        keep = {}
        for name in dict.fromkeys(name for block in neurons.blocks for name in block.weights):
            tensor = program.tensors[name]
            if program.kinds[name] is Kind.PARAMETER and (self.connections or self.lines):
                mask = torch.rand(tensor.shape, generator=generator) >= self.connections
                for dim in range(min(2, tensor.dim())):
                    line = torch.rand(tensor.shape[dim], generator=generator) >= self.lines
                    mask &= line.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
                keep[name] = mask
        return Masks(cut, keep)


FRACTIONS = st.sampled_from((0.5, 0.2, 0.9, 1.0))


def mask_plans(*, neurons: bool = False, connections: bool = False) -> st.SearchStrategy[MaskPlan]:
    """Plans that cut neurons, connections, or both."""
    none = st.just(0.0)
    return st.builds(
        MaskPlan,
        neurons=FRACTIONS if neurons else none,
        connections=st.sampled_from((0.0, 0.3, 0.7, 0.95, 1.0)) if connections else none,
        lines=st.sampled_from((0.3, 0.0, 0.6)) if connections else none,
        seed=st.integers(0, 2**16),
    )
