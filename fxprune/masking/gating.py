"""Gates and mask modules as nodes of the graph: what learns while the model trains.

A gate module gives two values for every neuron: its *scale*, which multiplies the weights of all
connections that leave the neuron, and whether it is *whole*, 1 or 0. Where an operation reads the
neuron other than through a weight (sums, products, normalizations, states at the boundary), and
where the weight could not take the scale up afterwards (a tied weight that is read both ways, one
that is rearranged first), the neuron is there or not, but never scaled. So a program can always
be hardened exactly: scales go into weights, and what is not whole is cut.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxprune.masking.insertion import MaskInsertion
from fxprune.masking.shielding import SHIELDED
from fxprune.operations import operation_name
from fxprune.program import Kind

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Block, Neurons
    from fxprune.analysis.places import Place
    from fxprune.program import Program

__all__ = [
    "GATES",
    "fold_scales",
    "insert_gates",
    "mask_module_name",
    "masked_straight_through",
    "scaled_blocks",
]

GATES = "_gates"
"""Name of the gate module in a gated program's module."""


_WEIGHTS: Mapping[str, int] = {
    "linear": 1,
    "matmul": 1,
    "mm": 1,
    **{f"conv{way}{n}d": 1 for way in ("", "_transpose") for n in (1, 2, 3)},
    **{cell: 2 for cell in ("gru", "rnn", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")},
    "lstm": 3,
    "lstm_cell": 2,
}
"""Position of the weight that multiplies an operation's first argument."""


def mask_module_name(weight: str) -> str:
    """Name of the module that masks a weight; no two weights share one."""
    return "_masks_" + weight.replace("_", "_u").replace(".", "_d")


def insert_gates(
    program: Program,
    neurons: Neurons,
    *,
    gated: Tensor | None = None,
    masked: Collection[str] = (),
    results: Mapping[str, fx.Node] = MappingProxyType({}),
    straight_through: bool = False,
    values: bool = False,
    rows: bool = False,
) -> Program:
    """The program with its masks as nodes, and calls of modules that gate and mask.

    Args:
        program: a program whose ``masks`` say what is pruned already.
        neurons: its analysis.
        gated: which neurons have a gate, bool [count]; None for none. The module :data:`GATES`
            gives their values: ``gates() -> (scale, whole)``, each [count + 1], 1 at the end, 1
            for neurons without a gate, 0 for those cut already.
        masked: weights that a module of their own masks: ``masks(weight) -> weight``.
        results: nodes of the program whose value a module masks, by the name of that module.
        straight_through: the gate module gives a third vector, of where gradients pass as if the
            gate were 1: ``gates() -> (scale, whole, through)``; see
            :func:`masked_straight_through`.
        values: of a product of a weight and a value, gate the value rather than the weight, where
            the value is at hand. It comes to the same, unless gradients go straight through: then
            those of the weights that feed a neuron arrive, instead of those that it feeds. Scales
            must be 0 or 1.
        rows: scale connections by the neuron that they end at as well, in the weights that
            :func:`fold_scales` can put that into.

    Returns:
        A program that ``module(parts)`` completes; ``parts`` holds the modules called.
    """
    insertion = _GateInsertion.into(program, neurons)
    insertion.straight_through = straight_through
    insertion.values = neurons.labels if values else {}
    if gated is not None:
        insertion.add_gates(gated, scaled_blocks(program, neurons))
    if rows:
        insertion.rows = frozenset((b.consumer, b.place) for b in _row_blocks(program, neurons))
    for name in masked:
        insertion.call_after(insertion.weight_node(name), mask_module_name(name))
    inserted = insertion.run(neurons)
    for name, node in results.items():  # last, as what is inserted above looks for direct uses
        insertion.call_after(insertion.twins[node], name)
    return inserted


def scaled_blocks(program: Program, neurons: Neurons) -> tuple[Block, ...]:
    """The blocks whose weight can take up the scales of its source neurons.

    That is a parameter which every operation that uses it reads as it is and with the same source
    neurons.
    """
    uses: dict[str, list[Block]] = {}
    for block in neurons.blocks:
        for name in block.weights:
            uses.setdefault(name, []).append(block)
    return tuple(
        block
        for weight, blocks in uses.items()
        if program.kinds.get(weight) is Kind.PARAMETER
        and all(b.direct and torch.equal(b.sources, blocks[0].sources) for b in blocks)
        and bool((blocks[0].sources >= 0).any())
        for block in blocks
    )


def _row_blocks(program: Program, neurons: Neurons) -> tuple[Block, ...]:
    """Those whose weight can take up the scales of its destinations too, the same in all uses."""
    scaled = scaled_blocks(program, neurons)
    first = {b.weight: b.destinations for b in reversed(scaled)}
    other = {b.weight for b in scaled if not torch.equal(b.destinations, first[b.weight])}
    return tuple(b for b in scaled if b.weight not in other)


def fold_scales(
    program: Program, neurons: Neurons, scale: Tensor, *, rows: bool = False
) -> Mapping[str, Tensor]:
    """The weights that change when the scales of neurons go into them.

    Args:
        program: the program that was gated; its tensors are left as they are.
        neurons: its analysis.
        scale: as the gate module gives it, [count + 1].
        rows: whether the gates were inserted with ``rows``.
    """
    ends = {(b.weight, "from"): b.sources for b in scaled_blocks(program, neurons)}
    if rows:
        ends |= {(b.weight, "to"): b.destinations for b in _row_blocks(program, neurons)}
    folded: dict[str, Tensor] = {}
    for (name, _), ids in ends.items():
        weight = folded.get(name, program.tensors[name].detach())
        gate = scale.to(weight.device)[ids.to(weight.device)].to(weight.dtype)
        if not bool((gate == 1).all()):
            folded[name] = weight * gate
    return folded


def masked_straight_through(x: Tensor, keep: Tensor, through: Tensor) -> Tensor:
    """``x * keep``, whose gradient is that of ``x`` where ``through`` is 1, though ``keep`` be 0.

    Args:
        x: any values.
        keep: 0 or 1, broadcastable to ``x``; fastest in the type of ``x``.
        through: 0 or 1, likewise. Where it is 0, the gradient is that of ``x * keep``.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> y = masked_straight_through(x, torch.tensor([True, False]), torch.tensor(True))
        >>> y.detach()
        tensor([1., 0.])
        >>> y.sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    both = keep.to(x.dtype), through.to(x.dtype)
    masked: Tensor = _StraightThrough.apply(x, *both)  # type: ignore[no-untyped-call]
    return masked


class _StraightThrough(torch.autograd.Function):
    """A function of its own, which costs one product each way; by detaching it would be six."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, keep: Tensor, _: Tensor) -> Tensor:
        return x * keep

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        keep, through = ctx.saved_tensors
        if through.numel() == 1 and through.is_cpu:  # looking at it costs nothing there
            return gradients[0] if bool(through) else gradients[0] * keep, None, None
        return gradients[0] * torch.maximum(keep, through), None, None


def _rows(block: Block) -> Tensor | None:
    """The neurons that a product's outputs are, one for each; None if there is no telling."""
    if not block.direct or block.destinations.numel() != block.shape[0]:
        return None
    return block.destinations.reshape(-1)


def _gated(x: Tensor, vector: Tensor, neurons: Tensor) -> Tensor:
    """Multiplies by the gates of the neurons that a value belongs to."""
    return x * vector[neurons].to(x.dtype)


def _gated_straight_through(x: Tensor, vector: Tensor, neurons: Tensor, through: Tensor) -> Tensor:
    return masked_straight_through(x, vector[neurons], through[neurons])


def _picked(vector: Tensor, neurons: Tensor) -> Tensor:
    return vector[neurons]


@dataclass
class _GateInsertion(MaskInsertion):
    """One run over one copy of the graph, with gates where there would be constants."""

    gated: Tensor | None = None
    scaled: frozenset[tuple[fx.Node, Place]] = frozenset()
    rows: frozenset[tuple[fx.Node, Place]] = frozenset()
    straight_through: bool = False
    values: Mapping[fx.Node, tuple[Tensor, ...]] = field(default_factory=dict)
    scale: fx.Node | None = None
    whole: fx.Node | None = None
    through: fx.Node | None = None

    def add_gates(self, gated: Tensor, blocks: tuple[Block, ...]) -> None:
        """Calls the gate module ahead of everything else."""
        self.gated = gated
        self.scaled = frozenset((b.consumer, b.place) for b in blocks)
        first = next(n for n in self.graph.nodes if n.op != "placeholder")
        with self.graph.inserting_before(first):
            both = self.graph.create_node("call_module", GATES)
            self.scale = self.graph.call_function(operator.getitem, (both, 0))
            self.whole = self.graph.call_function(operator.getitem, (both, 1))
            if self.straight_through:
                self.through = self.graph.call_function(operator.getitem, (both, 2))

    def call_after(self, node: fx.Node, name: str) -> None:
        """Has a module change what a node gives, wherever it is used."""
        with self.graph.inserting_after(node):
            call = self.graph.create_node("call_module", name, (node,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def gate_block(self, block: Block) -> None:
        """Multiplies by scales where those can go into the weight later."""
        self._gate_sources(block)
        if self.values:
            self._shield(block)

    def _gate_sources(self, block: Block) -> None:
        axes = self._axes_of_value(block)
        if axes:
            consumer = self.twins[block.consumer]
            for ids in axes:
                value: Any = consumer.args[0]
                consumer.update_arg(0, self.multiply(consumer, value, ids))
            return
        whole, use = self.whole, (block.consumer, block.place)
        if use in self.scaled:
            self.whole = self.scale
        super().gate_block(block)
        if use in self.rows:
            super().gate_block(replace(block, sources=block.destinations))
        self.whole = whole

    def _axes_of_value(self, block: Block) -> tuple[Tensor, ...]:
        """Where the gated neurons of a block lie in the value that its weight multiplies.

        None, if they do not all lie in a value that is multiplied with this weight and read by
        nothing else in the operation.
        """
        if not self.values:
            return ()
        value, position = block.consumer.args[0], _WEIGHTS.get(operation_name(block.consumer))
        if block.place != (position,) or value is block.operand:
            return ()
        axes = self.values.get(value, ()) if isinstance(value, fx.Node) else ()
        axes = tuple(torch.where(torch.isin(a, block.sources), a, -1) for a in axes)
        axes = tuple(a for a in axes if self.touches(a))
        wanted = block.sources[self._touched(block.sources)]
        found = torch.cat([a.reshape(-1) for a in axes]) if axes else wanted[:0]
        return axes if bool(torch.isin(wanted, found).all()) else ()

    def multiply(self, before: fx.Node, operand: fx.Node, ids: Tensor) -> fx.Node:
        """The operand times the gates of these neurons."""
        if self.gated is None:
            return super().multiply(before, operand, ids)
        with self.graph.inserting_before(before):
            numbers = self.constant(ids, "neurons", None)
            product = (
                self.graph.call_function(_gated, (operand, self.whole, numbers))
                if self.through is None
                else self.graph.call_function(
                    _gated_straight_through, (operand, self.whole, numbers, self.through)
                )
            )
        product.meta = dict(operand.meta)
        return product

    def _shield(self, block: Block) -> None:
        """Keeps gradients of neurons that are out from what the product that makes them reads."""
        consumer, rows = self.twins[block.consumer], _rows(block)
        function = SHIELDED.get(consumer.target)
        if function is None or rows is None or not self.touches(rows):
            return
        with self.graph.inserting_before(consumer):
            numbers = self.constant(rows, "neurons", None)
            shielded = self.graph.call_function(function, (self.whole, numbers, *consumer.args))
        shielded.meta = dict(consumer.meta)
        consumer.replace_all_uses_with(shielded)
        self.graph.erase_node(consumer)
        self.twins[block.consumer] = shielded

    def keep(self, ids: Tensor, dtype: torch.dtype) -> fx.Node:
        """A node for which of these neurons are there."""
        if self.gated is None:
            return super().keep(ids, dtype)
        return self.graph.call_function(_picked, (self.whole, self.constant(ids, "neurons", None)))

    def touches(self, ids: Tensor) -> bool:
        """Whether any of these neurons is cut or has a gate."""
        return bool(self._touched(ids).any())

    def _touched(self, ids: Tensor) -> Tensor:
        cut = self.is_cut(ids)
        return cut if self.gated is None else cut | (self.gated[ids.clamp(min=0)] & (ids >= 0))
