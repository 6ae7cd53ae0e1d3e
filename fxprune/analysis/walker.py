"""Walks a program's graph once and labels every value with the neurons of its elements.

The walker knows the bookkeeping; what an operation does to labels is a rule (see the ``rules``
modules): a function of the walker and the node that returns the labels of the node's value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.analysis.labels import Axis, Ledger
from fxprune.analysis.neurons import INPUT, OUTPUT
from fxprune.analysis.places import Place
from fxprune.operations import operation_name
from fxprune.program import Refusal
from fxprune.tracing import packing
from fxprune.tracing.importing import place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fxprune.analysis.boundary import Boundary
    from fxprune.program import Program

__all__ = [
    "CONVOLUTIONS",
    "Label",
    "Rule",
    "Use",
    "Walker",
]

Label = tuple[Axis, ...]
Rule = "Callable[[Walker, fx.Node], Any]"


@dataclass(frozen=True)
class Use:
    """A weight used to connect neurons."""

    operand: fx.Node
    consumer: fx.Node
    place: Place
    sources: Tensor
    destinations: Tensor


@dataclass(frozen=True)
class Read:
    """Neurons read other than through a weight."""

    node: fx.Node
    operand: fx.Node
    neurons: Tensor
    kind: str


@dataclass
class Walker:
    """State of one walk over one program."""

    program: Program
    rules: Mapping[str, Callable[[Walker, fx.Node], Any]]
    ledger: Ledger = field(default_factory=Ledger)
    labels: dict[fx.Node, Any] = field(default_factory=dict)
    weights: dict[fx.Node, str] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    units: list[tuple[str, Tensor]] = field(default_factory=list)
    entries: list[tuple[fx.Node, fx.Node, Tensor]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    boundary: Boundary | None = None
    shrunk: frozenset[fx.Node] = frozenset()
    unbacked: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._find_sizes()

    def is_boundary(self, node: fx.Node) -> bool:
        """Whether a value is a state on its way in, kept at its external size."""
        return self.boundary is not None and node in self.boundary.inputs

    def walk(self) -> None:
        """Labels every node."""
        weight_nodes = self._find_weights()
        for node in self.program.graph.nodes:
            if self.boundary and node in (self.boundary.inputs | self.boundary.between):
                self.labels[node] = ()
            elif node.op == "placeholder":
                self.labels[node] = self._input(node)
            elif node.op == "get_attr":
                self.labels[node] = self._tensor(node, node in weight_nodes)
            elif node.op == "call_function":
                self.labels[node] = self._apply(node)
            elif node.op == "output":
                self._output(node)

    # Shapes at the example's sizes ---------------------------------------------------------

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's value at the example inputs."""
        known = self.shapes.get(node)
        if known is None:
            known = tuple(self.size(s) for s in node.meta["val"].shape)
            self.shapes[node] = known
        return known

    def size(self, value: Any) -> int:
        """An integer argument at the example inputs: a number, a symbol or a node."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, int):
            return value
        expression = value.node.expr
        unbacked = self.unbacked and expression.free_symbols & self.unbacked
        hint = None if unbacked else value.node.hint
        if hint is not None:
            return int(hint)
        return int(expression.subs(self.sizes))

    def static(self, value: Any) -> bool:
        """Whether an integer argument or size is a plain number."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        return isinstance(value, int) or str(value).lstrip("-").isdigit()

    def dims_static(self, node: fx.Node) -> list[bool]:
        """For each dimension of a node's value whether its size is fixed."""
        return [self.static(s) for s in node.meta["val"].shape]

    def _find_sizes(self) -> None:
        """Notes sizes that only running tells: the longest sequence is taken to fill the time."""
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node.target is packing.pad_packed:
                steps = node.meta["val"].shape[0]
                if isinstance(steps, torch.SymInt) and not steps.node.has_hint():
                    source = node.args[0]
                    assert isinstance(source, fx.Node)
                    for symbol in steps.node.expr.free_symbols:
                        self.unbacked.add(symbol)
                        self.sizes[symbol] = self.size(source.meta["val"].shape[0])

    # Where labels begin and end ---------------------------------------------------------------

    def _input(self, node: fx.Node) -> Label:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ()
        axes = self.fresh_joint(node)
        if node not in self.shrunk:
            for axis in axes:
                self.ledger.freeze(axis.ids, INPUT)
        return axes

    def _tensor(self, node: fx.Node, weight: bool) -> Label:
        tensor = self.program.tensors[str(node.target)]
        if weight:
            self.weights[node] = str(node.target)
            axes = []
            for d, size in enumerate(tensor.shape):
                if size > 1 or d < 2:
                    shape = [size if i == d else 1 for i in range(tensor.dim())]
                    axes.append(Axis(self.ledger.fresh(*shape), d))
            return tuple(axes)
        if tensor.dim() == 0 or tensor.numel() == 1:
            return ()
        if not tensor.is_floating_point():
            return ()
        return (Axis(self.ledger.fresh(*tensor.shape)),)

    def fresh_joint(self, node: fx.Node) -> Label:
        """One axis with a new neuron for every position over the fixed dimensions."""
        shape = self.shape(node)
        fixed = self.dims_static(node)
        sizes = [s if f else 1 for s, f in zip(shape, fixed, strict=True)]
        if all(s == 1 for s in sizes):
            return ()
        return (Axis(self.ledger.fresh(*sizes)),)

    def _output(self, node: fx.Node) -> None:
        results: Any = node.args[0]
        for part in self.boundary.final_states if self.boundary else ():
            for axis in self.labels[part]:
                self.read(node, part, axis.ids, "state")
        for result in results:
            if self.boundary and result in self.boundary.outputs:
                continue
            if isinstance(result, fx.Node) and result not in self.shrunk:
                for axis in self.labels[result]:
                    self.read(node, result, axis.ids, "other")
                    self.ledger.freeze(axis.ids, OUTPUT)

    def _find_weights(self) -> set[fx.Node]:
        """Tensors that some operation contracts with: their dimensions are rows and columns."""
        found: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if node.op != "call_function":
                continue
            for position in _WEIGHT_POSITIONS.get(operation_name(node), ()):
                if position < len(node.args) and isinstance(node.args[position], fx.Node):
                    found.update(self.roots(node.args[position]))
            if operation_name(node) == "einsum":
                for operand in node.args[1]:
                    found.update(self.roots(operand))
        return found

    def roots(self, node: Any) -> list[fx.Node]:
        """The tensors a weight operand is made of, through rearrangements only."""
        if node.op == "get_attr":
            return [node]
        if node.op == "call_function" and operation_name(node) in _REARRANGEMENTS:
            return [r for n in node.all_input_nodes for r in self.roots(n)]
        return []

    # For the rules -----------------------------------------------------------------------------

    def label(self, node: Any) -> Label:
        """The axes of an argument; none for numbers and None."""
        return self.labels[node] if isinstance(node, fx.Node) else ()

    def axes_at(self, node: Any, dim: int) -> tuple[Axis, ...]:
        """Axes of a value that change along a dimension."""
        return tuple(a for a in self.label(node) if dim in a.dims)

    def read(self, node: fx.Node, operand: fx.Node, ids: Tensor, kind: str) -> None:
        """Notes that an operation reads neurons."""
        self.reads.append(Read(node, operand, ids, kind))

    def refuse(self, node: fx.Node, reason: str, *ids: Tensor) -> None:
        """Freezes neurons and records why."""
        text = f"{reason}{place_of(node)}"
        self.refusals.append(Refusal(node.name, text))
        for array in ids:
            self.ledger.freeze(array, reason)

    def settle(self, axes: Iterable[Axis]) -> Label:
        """The axes of an activation; one that is down to a single position must stay.

        A lone neuron cannot be told from a plain value later on, and a dimension keeps one.
        """
        kept = []
        for axis in axes:
            if axis.ids.numel() > 1 or axis.role is not None:
                kept.append(axis)
            else:
                self.ledger.freeze(axis.ids, "the only one of its dimension")
        return tuple(kept)

    def freeze_inputs(self, node: fx.Node, reason: str) -> None:
        """Freezes everything an operation touches."""
        ids = [a.ids for n in node.all_input_nodes for a in _flat(self.labels.get(n, ()))]
        if ids:
            self.refuse(node, reason, *ids)
        for n in node.all_input_nodes:
            for axis in _flat(self.labels.get(n, ())):
                self.read(node, n, axis.ids, "other")

    def _apply(self, node: fx.Node) -> Any:
        if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            return ()  # arithmetic on sizes
        tags = getattr(node.target, "tags", ())
        other = self.rules["pointwise" if torch.Tag.pointwise in tags else "unknown"]
        label = self.rules.get(operation_name(node), other)(self, node)
        if isinstance(label, list):
            return [self.settle(part) for part in label]
        return self.settle(label)


def _flat(label: Any) -> list[Axis]:
    if isinstance(label, Axis):
        return [label]
    return [a for part in label for a in _flat(part)]


CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
"""Names of the operations that convolve."""


_REARRANGEMENTS = {
    "t",
    "numpy_T",
    "transpose",
    "swapaxes",
    "swapdims",
    "movedim",
    "permute",
    "view",
    "reshape",
    "_unsafe_view",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "chunk",
    "getitem",
    "cat",
    "stack",
    "contiguous",
    "clone",
    "to",
    "_to_copy",
    "detach",
    "alias",
    "expand",
    "narrow",
    "unbind",
    "mT",
    "flatten",
    "unflatten",
}

_WEIGHT_POSITIONS: dict[str, tuple[int, ...]] = {
    "linear": (1,),
    "matmul": (0, 1),
    "mm": (0, 1),
    "mv": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "embedding": (0,),
    "conv1d": (1,),
    "conv2d": (1,),
    "conv3d": (1,),
    "convolution": (1,),
    "conv_transpose1d": (1,),
    "conv_transpose2d": (1,),
    "conv_transpose3d": (1,),
    "lstm": (3, 4, 7),
    "gru": (2, 3),
    "rnn": (2, 3),
    "lstm_cell": (2, 3),
    "gru_cell": (2, 3),
    "rnn_tanh_cell": (2, 3),
    "rnn_relu_cell": (2, 3),
    "bilinear": (2,),
}
