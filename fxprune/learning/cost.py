"""What neurons cost: parameters, multiply-accumulate operations or milliseconds, differentiably.

    cost(p) = sum over parts of price * sum over entries of p(neuron) * p(other neuron)

with p the probability that a neuron is there. A part is a parameter tensor, at 1 for each entry;
or for the other kinds a block of connections, each at the price of its operation divided by the
operation's connections. An entry that belongs to one neuron twice, such as the weight from a
recurrent neuron to itself, counts p once.

1. Where the two ends vary along different dimensions of a part, the sum over its entries is the
   product of two sums over neurons, sum_ij p_i p_j = (sum_i p_i) (sum_j p_j), so no part is ever
   written out.
2. Biases and gains count as parameters, and tied weights once, as in a report.
3. Products without a weight (attention scores) have no price: they are no connections.

Source: Wen, Zhang, Bai, Xu, "Structured pruning of recurrent neural networks through neuron
selection", https://arxiv.org/abs/1906.06847, where each connection counts 1.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.analysis.labels import varying
from fxprune.learning.precise import Precise
from fxprune.learning.variables import reduced
from fxprune.masking.macs import macs_by_node
from fxprune.program import Kind
from fxprune.randomness import preserved_random_state

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Neurons
    from fxprune.program import Program

__all__ = ["COSTS", "Cost"]

COSTS = ("parameters", "macs", "milliseconds")

_WARM_UP, _RUNS = 2, 9


class Cost(Precise):
    """The cost of a program, by which of its neurons there are.

    Prices are measured anew for each of these, but a training keeps those that it began with, in
    a buffer (see :meth:`keep_prices`); the processes of a distributed training share the mean of
    what each measured.

    Args:
        program: what it costs. It is run on its example, unless parameters are counted.
        neurons: its analysis.
        kind: what is counted, at the example's sizes.

    Attributes:
        names: the parts: tensors, or blocks of connections.

    Example:
        >>> from fxprune.analysis import analyze
        >>> from fxprune.tracing.tracer import trace
        >>> layers = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
        >>> program = trace(layers, torch.zeros(1, 3))
        >>> cost = Cost(program, analyze(program), "parameters")
        >>> cost.dense
        50.0
    """

    kept: Tensor
    free: Tensor
    first: Tensor
    second: Tensor

    def __init__(
        self,
        program: Program,
        neurons: Neurons,
        kind: Literal["parameters", "macs", "milliseconds"] = "macs",
    ) -> None:
        super().__init__()
        parts = _tensors(program, neurons) if kind == "parameters" else _blocks(neurons)
        free = neurons.free.nonzero().flatten()
        # Where a neuron's probability is in [p of free neurons, 1]; -1 is the 1, which stays.
        column = torch.full((neurons.count + 1,), -1)
        column[free] = torch.arange(len(free))
        laid_out = [_lay_out(part, column, len(free)) for part in parts]
        self.names = tuple(p.name for p in parts)
        self.neurons = neurons.count
        self.register_buffer("free", free, persistent=False)
        for i, name in enumerate(("first", "second")):
            sums = [o[i] if isinstance(o, tuple) else torch.zeros(len(free) + 1) for o in laid_out]
            stacked = torch.stack(sums) if sums else torch.zeros(0, len(free) + 1)
            self.register_buffer(name, stacked.double(), persistent=False)
        self._written_out = {i: len(o) for i, o in enumerate(laid_out) if isinstance(o, list)}
        for i, axes in self._written_out.items():
            for k in range(axes):
                axis = laid_out[i][k].contiguous()  # a fit writes its best weights back, and these
                self.register_buffer(f"axis_{i}_{k}", axis, persistent=False)
        prices, measured = _prices(program, parts, kind), kind == "milliseconds"
        # No buffer: by its buffers a checkpoint tells whether it is of the same training.
        self._measured = prices if measured else None
        kept = torch.full_like(prices, math.nan) if measured else prices
        self.register_buffer("kept", kept, persistent=measured)

    @property
    def prices(self) -> Tensor:
        """The price of one entry of each part, float64 [parts]."""
        if self._measured is None:
            return self.kept
        return torch.where(self.kept.isnan(), self._measured.to(self.kept.device), self.kept)

    def keep_prices(self) -> None:
        """Puts the prices into the state, so that a training that is resumed goes on with them."""
        self.kept.copy_(self.prices)

    @property
    def dense(self) -> float:
        """The cost of all neurons."""
        return float(self.expected(torch.ones(self.neurons, device=self.prices.device)))

    def expected(self, present: Tensor) -> Tensor:
        """The expected cost, a differentiable scalar in float64.

        Args:
            present: the probability that each neuron is there, [count].
        """
        return self.prices @ self.entries(present)

    def entries(self, present: Tensor) -> Tensor:
        """How many entries of each part are expected to be there, [parts], in float64."""
        some = present[self.free].double()
        p = torch.cat([some, some.new_ones(1)])
        once = p - p * p  # what p * p lacks where both ends are one neuron
        found = (self.first @ p) * (self.second @ p) + (self.first * self.second) @ once
        for part, axes in self._written_out.items():
            product = p.new_ones(())
            for k in range(axes):
                product = product * p[self.get_buffer(f"axis_{part}_{k}")]
            found = torch.cat([found[:part], product.sum().reshape(1), found[part + 1 :]])
        return found


@dataclass(frozen=True)
class _Part:
    """Entries that have one price, and the neurons that they belong to."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[Tensor, ...]
    consumer: fx.Node | None = None


def _tensors(program: Program, neurons: Neurons) -> list[_Part]:
    return [
        _Part(name, tuple(tensor.shape), neurons.owned.get(name, ()))
        for name, tensor in program.tensors.items()
        if program.kinds[name] is Kind.PARAMETER
    ]


def _blocks(neurons: Neurons) -> list[_Part]:
    return [_Part(b.name, b.shape, (b.sources, b.destinations), b.consumer) for b in neurons.blocks]


def _lay_out(part: _Part, column: Tensor, free: int) -> tuple[Tensor, Tensor] | list[Tensor]:
    """How often each free neuron occurs along two axes of a part, [free + 1] each.

    The last entry counts positions of neurons that stay. A list of axes instead, which multiply
    to the part written out, where that does not say it all.
    """
    rank = len(part.shape)
    aligned = [a.reshape((1,) * (rank - a.dim()) + tuple(a.shape)) for a in part.axes]
    axes = [column[a] for a in aligned]
    axes = [a for a in axes if bool((a >= 0).any())]
    used = [d for a in axes for d in varying(a)]
    if len(axes) > 2 or len(set(used)) < len(used):
        return _once(axes, part.shape)
    stays = torch.tensor([-1])
    first, second = (*axes, stays, stays)[:2]
    repeats = math.prod(part.shape) / (first.numel() * second.numel())
    counted = [
        torch.bincount(a.flatten() % (free + 1), minlength=free + 1) for a in (first, second)
    ]
    return counted[0].double() * repeats, counted[1].double()


def _once(axes: Sequence[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """Axes of a part, written out, in which no entry meets a neuron twice."""
    kept: list[Tensor] = []
    for axis in axes:
        own = axis.expand(shape)
        for earlier in kept:
            own = torch.where(own == earlier, -1, own)
        kept.append(own)
    return kept


def _prices(program: Program, parts: Sequence[_Part], kind: str) -> Tensor:
    """The price of one entry of each part, float64 [parts]."""
    if kind == "parameters":
        return torch.ones(len(parts), dtype=torch.float64)
    by_node = macs_by_node(program) if kind == "macs" else _milliseconds(program)
    costs: dict[fx.Node | None, float] = {node: found for node, found in by_node.items()}
    connections: Counter[fx.Node | None] = Counter()
    for part in parts:
        connections[part.consumer] += math.prod(part.shape)
    prices = [costs.get(p.consumer, 0.0) / max(1, connections[p.consumer]) for p in parts]
    own = torch.tensor(prices, dtype=torch.float64)
    shared = reduced(own, own) if kind == "milliseconds" else own
    return own if shared is None else shared


def _milliseconds(program: Program) -> Mapping[fx.Node, float]:
    """What each operation takes on the example: the median of some runs, after warming up."""
    runner = _Stopwatch(fx.GraphModule(dict(program.tensors), program.graph))
    with preserved_random_state(), torch.no_grad():
        for _ in range(_WARM_UP):
            runner.run(*pytree.tree_leaves(program.example))
        runner.seconds.clear()
        for _ in range(_RUNS):
            runner.run(*pytree.tree_leaves(program.example))
    original = {n.name: n for n in program.graph.nodes}
    return {original[name]: 1e3 * median(s) for name, s in runner.seconds.items()}


class _Stopwatch(fx.Interpreter):
    """Runs a graph and notes what each operation takes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        _wait()
        start = time.perf_counter()
        result = super().run_node(n)
        _wait()
        if n.op == "call_function":
            self.seconds.setdefault(n.name, []).append(time.perf_counter() - start)
        return result


def _wait() -> None:
    """Waits for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
