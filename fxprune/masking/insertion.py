"""Masks as nodes of the graph: the masked program, the reference for all that follows.

A connection mask multiplies its weight. A cut neuron multiplies, by one shared 0/1 vector, every
block of connections that leaves it; where a sum, a product, a normalization or a state at the
boundary reads it instead, that operation gets the neuron as zero, or leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, fx

from fxprune.analysis.boundary import outward_users
from fxprune.analysis.places import argument_at, with_argument
from fxprune.errors import DependencyError
from fxprune.masking.masks import Masks
from fxprune.masking.normalization import masked_group_norm, masked_layer_norm, masked_rms_norm
from fxprune.operations import operation_name
from fxprune.program import Kind, Program, free_name

if TYPE_CHECKING:
    from fxprune.analysis.neurons import Block, Neurons, Reader

__all__ = ["MaskInsertion", "insert_masks"]

aten = torch.ops.aten


def insert_masks(program: Program, neurons: Neurons) -> Program:
    """The program with its masks as nodes; shapes are those of the program.

    Args:
        program: a program whose ``masks`` say what is pruned.
        neurons: its analysis.

    Returns:
        A program without masks of its own that computes what the masked program does.
    """
    if program.masks.empty:
        return replace(program, masks=Masks())
    return MaskInsertion.into(program, neurons).run(neurons)


@dataclass
class MaskInsertion:
    """One run over one copy of the graph."""

    program: Program
    graph: fx.Graph
    twins: dict[fx.Node, fx.Node]
    tensors: dict[str, Tensor]
    cut: Tensor
    gates: dict[tuple[Any, ...], str]

    @classmethod
    def into(cls, program: Program, neurons: Neurons) -> Self:
        graph, twins = program.copy_graph()
        cut = torch.zeros(neurons.count, dtype=torch.bool)
        cut[program.masks.neurons] = True
        return cls(program, graph, twins, dict(program.tensors), cut, {})

    def run(self, neurons: Neurons) -> Program:
        for name, keep in self.program.masks.connections.items():
            if not bool(keep.all()):
                self._mask_weight(name, keep)
        for block in neurons.blocks:
            self.gate_block(block)
        for reader in neurons.readers:
            if self.touches(reader.neurons):
                self._gate_reader(reader)
        added = {n: Kind.CONSTANT for n in self.tensors if n not in self.program.tensors}
        return replace(
            self.program,
            graph=self.graph,
            tensors=self.tensors,
            kinds={**self.program.kinds, **added},
            masks=Masks(),
        )

    def _mask_weight(self, name: str, keep: Tensor) -> None:
        node, weight = self.weight_node(name), self.tensors[name]
        with self.graph.inserting_after(node):
            mask = self.constant(keep.to(weight), "mask", node.meta.get("val"))
        with self.graph.inserting_after(mask):
            masked = self.graph.call_function(aten.mul.Tensor, (node, mask))
        masked.meta = dict(node.meta)
        node.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)

    def weight_node(self, name: str) -> fx.Node:
        """The node that stands for a tensor of the program."""
        found: fx.Node = next(
            n for n in self.graph.nodes if n.op == "get_attr" and n.target == name
        )
        return found

    def gate_block(self, block: Block) -> None:
        if self.touches(block.sources):
            consumer = self.twins[block.consumer]
            operand = argument_at(consumer.args, block.place)
            gated = self.multiply(consumer, operand, block.sources)
            consumer.args = with_argument(consumer.args, block.place, gated)

    def _gate_reader(self, reader: Reader) -> None:
        node, operand = self.twins[reader.node], self.twins[reader.operand]
        if reader.kind == "normalization":
            self._normalize(node, reader)
        elif reader.kind in ("reduction", "state"):
            out = outward_users(reader.operand) if reader.kind == "state" else [reader.node]
            for user in (self.twins[u] for u in out):
                user.replace_input_with(operand, self.multiply(user, operand, reader.neurons))
        else:
            raise DependencyError(
                f"{reader.node.target} needs neurons that were cut", nodes=(reader.node.name,)
            )

    def _normalize(self, node: fx.Node, reader: Reader) -> None:
        with self.graph.inserting_before(node):
            gate = self.keep(reader.neurons.reshape(-1), self.dtype(node))
            name = operation_name(node)
            x, *rest = node.args
            if name == "group_norm":
                weight, bias, eps = (*rest[1:4], None, None, None)[:3]
                args: tuple[Any, ...] = (
                    x,
                    rest[0],
                    gate,
                    weight,
                    bias,
                    1e-5 if eps is None else eps,
                )
                function: Any = masked_group_norm
            elif name == "rms_norm":
                function, args = masked_rms_norm, (x, gate, *rest[1:3])
            else:
                weight, bias, eps = (*rest[1:4], None, None, None)[:3]
                function, args = (
                    masked_layer_norm,
                    (x, gate, weight, bias, 1e-5 if eps is None else eps),
                )
            masked = self.graph.call_function(function, args)
        masked.meta = dict(node.meta)
        node.replace_all_uses_with(masked)
        self.graph.erase_node(node)
        self.twins[reader.node] = masked

    def multiply(self, before: fx.Node, operand: fx.Node, ids: Tensor) -> fx.Node:
        with self.graph.inserting_before(before):
            gate = self.keep(ids, self.dtype(operand))
            product = self.graph.call_function(aten.mul.Tensor, (operand, gate))
        product.meta = dict(operand.meta)
        return product

    def keep(self, ids: Tensor, dtype: torch.dtype) -> fx.Node:
        """A node for which of these neurons are there: 1 or 0, shaped like ``ids``."""
        return self.constant((~self.is_cut(ids)).to(dtype), "gate", None)

    def constant(self, value: Tensor, stem: str, meta: Any) -> fx.Node:
        """A node for a constant; equal gates are one tensor."""
        key = (
            (stem, tuple(value.shape), value.dtype, value.numpy(force=True).tobytes())
            if (value.numel() < 4096 and value.dtype not in (torch.bfloat16,))
            else None
        )
        name = self.gates.get(key) if key else None
        if name is None:
            name = free_name(stem, self.tensors)
            self.tensors[name] = value.to(self._device())
            if key:
                self.gates[key] = name
        node = self.graph.create_node("get_attr", name)
        if meta is not None:
            node.meta["val"] = meta
        return node

    def _device(self) -> torch.device:
        return next((t.device for t in self.program.tensors.values()), torch.device("cpu"))

    def dtype(self, node: fx.Node) -> torch.dtype:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.dtype
        return next(t.dtype for t in self.tensors.values() if t.is_floating_point())

    def is_cut(self, ids: Tensor) -> Tensor:
        return (ids >= 0) & self.cut[ids.clamp(min=0)]

    def touches(self, ids: Tensor) -> bool:
        return bool(self.is_cut(ids).any())
