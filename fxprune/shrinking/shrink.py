"""Shrinking: slices every tensor once and rewrites what mentions sizes.

The result has only the neurons kept; masks on what is left stay masks of the smaller program.
The input program is not changed, and shares no memory with the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.analysis.boundary import outward_users
from fxprune.analysis.neurons import Entry, Neurons, Reader
from fxprune.analysis.walker import Walker
from fxprune.masking.masks import Masks
from fxprune.operations import argument, dims_of, operation_name
from fxprune.program import InputSpec, Kind, Program, free_name
from fxprune.shrinking.rewriting import RULES
from fxprune.tracing.states import enter_state, leave_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.calls import Call

__all__ = ["Shrunk", "shrink"]

aten = torch.ops.aten

Slices = tuple[Tensor | None, ...]
"""For each dimension of a tensor the kept positions; None where all are kept."""


@dataclass(frozen=True)
class Shrunk:
    """A smaller program.

    Attributes:
        program: the program; its masks are those of the connections left.
        neurons: the analysis of the original, over the smaller program's nodes.
        kept: for every sliced tensor the kept indices per dimension; None for all.
        input_slices: likewise for every input leaf; only states at the boundary shrink.
        output_slices: likewise for every output leaf.
    """

    program: Program
    neurons: Neurons
    kept: Mapping[str, Slices]
    input_slices: tuple[Slices, ...]
    output_slices: tuple[Slices, ...]


def shrink(program: Program, neurons: Neurons, kept: Tensor) -> Shrunk:
    """Removes every neuron that is not kept.

    Args:
        program: the program with its masks; dead neurons are read by nothing.
        neurons: its analysis.
        kept: bool [neurons.count]; see :func:`fxprune.shrinking.liveness.kept_neurons`.
    """
    return _Shrinking(program, neurons, kept).run()


class _Shrinking:
    """One shrinking of one program."""

    def __init__(self, program: Program, neurons: Neurons, kept: Tensor) -> None:
        self.program, self.neurons, self.kept = program, neurons, kept
        self._present = np.append(kept.numpy(), True)  # where -1 is no neuron, nothing goes
        self.sizes = Walker(program, {})
        self.graph, self.twins = program.copy_graph()
        self.tensors: dict[str, Tensor] = {}
        self.slices: dict[str, Slices] = {}

    def run(self) -> Shrunk:
        with torch.no_grad(), torch.inference_mode(False):
            for name, tensor in self.program.tensors.items():
                self.slices[name] = self._slices(name, tensor)
                self.tensors[name] = _own(tensor, self.slices[name])
        # Users first: their arguments are looked up, and a mean is replaced by its multiple.
        for node in reversed(list(self.program.graph.nodes)):
            if node.op == "call_function":
                self._rewrite(node)
        self._states_in()
        self._states_out()
        masks, inputs = self._masks(), self._input_slices()
        kinds = {**self.program.kinds}
        kinds.update({n: Kind.CONSTANT for n in self.tensors if n not in kinds})
        smaller = replace(
            self.program,
            graph=self.graph,
            tensors=self.tensors,
            kinds=kinds,
            inputs=_smaller_inputs(self.program.inputs, inputs),
            example=_smaller_call(self.program.example, inputs),
            masks=masks,
        )
        return Shrunk(smaller, self._neurons(), self.slices, inputs, self._output_slices())

    # What the rewriting rules ask ----------------------------------------------------------

    def positions(self, value: Any, dim: int, part: int | None = None) -> Tensor | None:
        if not isinstance(value, fx.Node):
            return None
        label: Any = self.neurons.labels.get(value, ())
        if part is not None:
            label = label[part]
        return self._positions(label, dim)

    def size(self, value: Any) -> int:
        return self.sizes.size(value)

    def _positions(self, label: tuple[Tensor, ...], dim: int) -> Tensor | None:
        keep: NDArray[np.bool_] | None = None
        for ids in label:
            if ids.shape[dim] > 1:
                slices = np.moveaxis(self._stays(ids), dim, 0).reshape(ids.shape[dim], -1)
                along = np.all(slices, axis=1)
                keep = along if keep is None else keep & along
        return None if keep is None or keep.all() else torch.from_numpy(np.flatnonzero(keep))

    def _stays(self, ids: Tensor) -> NDArray[np.bool_]:
        stays: NDArray[np.bool_] = self._present[ids.numpy()]
        return stays

    # Tensors and nodes ---------------------------------------------------------------------

    def _slices(self, name: str, tensor: Tensor) -> Slices:
        label = self.neurons.owned.get(name, ())
        return tuple(self._positions(label, d) for d in range(tensor.dim()))

    def _rewrite(self, node: fx.Node) -> None:
        twin = self.twins[node]
        name = operation_name(node)
        if name in ("split", "chunk", "split_with_sizes"):
            self._split(node, twin)
        elif name == "mean":
            self._mean(node, twin)
        elif name == "squeeze":
            self._squeeze(node, twin)
        elif name == "scaled_dot_product_attention":
            self._attention(node, twin)
        elif name == "index_select":
            self._index(node, twin)
        elif name in RULES:
            arguments = RULES[name](node, self)
            twin.args = fx.map_arg(arguments, self.twins.__getitem__)

    def _split(self, node: fx.Node, twin: fx.Node) -> None:
        x: Any = node.args[0]
        rank = x.meta["val"].dim()
        dim = int(argument(node, "dim")) % rank
        if self.positions(x, dim) is None:
            return
        sizes = []
        for part, value in enumerate(node.meta["val"]):
            positions = self.positions(node, dim, part)
            sizes.append(self.size(value.shape[dim]) if positions is None else len(positions))
        twin.target = aten.split_with_sizes.default
        twin.args, twin.kwargs = (twin.args[0], sizes, dim), {}

    def _mean(self, node: fx.Node, twin: fx.Node) -> None:
        """The mean keeps its divisor: what is gone counted as zero."""
        x: Any = node.args[0]
        factor = 1.0
        for d in dims_of(argument(node, "dim"), x.meta["val"].dim()):
            positions = self.positions(x, d)
            if positions is not None:
                factor *= len(positions) / self.size(x.meta["val"].shape[d])
        if factor != 1.0:
            with self.graph.inserting_after(twin):
                scaled = self.graph.call_function(aten.mul.Tensor, (twin, factor))
            scaled.meta = dict(twin.meta)
            twin.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

    def _squeeze(self, node: fx.Node, twin: fx.Node) -> None:
        """A dimension that has lost neurons stays, also where one is left."""
        x: Any = node.args[0]
        rank = x.meta["val"].dim()
        squeezed = sorted(dims_of(argument(node, "dim"), rank))
        dims = [d for d in squeezed if self.positions(x, d) is None]
        if not dims:
            twin.target, twin.args = aten.alias.default, twin.args[:1]
        elif dims != squeezed:
            twin.target, twin.args = aten.squeeze.dims, (twin.args[0], dims)

    def _attention(self, node: fx.Node, twin: fx.Node) -> None:
        query: Any = node.args[0]
        rank = query.meta["val"].dim()
        if self.positions(query, rank - 1) is not None and node.kwargs.get("scale") is None:
            size = self.size(query.meta["val"].shape[-1])
            twin.kwargs = {**twin.kwargs, "scale": size**-0.5}

    def _index(self, node: fx.Node, twin: fx.Node) -> None:
        x, dim, index = node.args[:3]
        rank = x.meta["val"].dim()  # type: ignore[union-attr]
        positions = self.positions(x, int(dim) % rank)  # type: ignore[arg-type]
        if positions is None:
            return
        from fxprune.analysis.rules_moving import constant_value

        old = constant_value(self.sizes, index)
        assert old is not None
        keep = torch.isin(old, positions)
        new = torch.searchsorted(positions, old[keep])
        with self.graph.inserting_before(twin):
            twin.update_arg(2, self._constant("index", new))

    def _constant(self, stem: str, value: Tensor) -> fx.Node:
        name = free_name(stem, self.tensors)
        device = next((t.device for t in self.program.tensors.values()), torch.device("cpu"))
        self.tensors[name] = value.to(device)
        return self.graph.create_node("get_attr", name)

    # States at the boundary ------------------------------------------------------------------

    def _states_in(self) -> None:
        for entry in self.neurons.entries:
            stays = self._stays(entry.neurons)
            if stays.all():
                continue
            consumer, state = self.twins[entry.consumer], self.twins[entry.state]
            with self.graph.inserting_before(consumer):
                units = self._constant("units", torch.from_numpy(np.flatnonzero(stays)))
                entered = self.graph.call_function(enter_state, (state, units))
            _replace_state(entry, consumer, state, entered)

    def _states_out(self) -> None:
        for reader in self.neurons.readers:
            if reader.kind != "state":
                continue
            present = self._stays(reader.neurons)
            if present.all():
                continue
            stays = torch.from_numpy(present).reshape(-1)
            part = self.twins[reader.operand]
            # A unit that was cut, but had to stay physically, leaves as the zero it is.
            shown = stays & ~torch.isin(reader.neurons.reshape(-1), self.program.masks.neurons)
            places = torch.where(shown, stays.cumsum(0) - 1, int(stays.sum()))
            # Each user has one of its own: a value with several is no state when traced again.
            for user in (self.twins[u] for u in outward_users(reader.operand)):
                with self.graph.inserting_before(user):
                    node = self._constant("places", places)
                    left = self.graph.call_function(leave_state, (part, node))
                left.meta = dict(part.meta)
                user.replace_input_with(part, left)

    # The rest of the program -----------------------------------------------------------------

    def _masks(self) -> Masks:
        left = self.kept[self.program.masks.neurons]
        connections = {
            name: _sliced(mask, self.slices[name])
            for name, mask in self.program.masks.connections.items()
        }
        return Masks(self.program.masks.neurons[left], connections)

    def _input_slices(self) -> tuple[Slices, ...]:
        placeholders = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        return tuple(
            tuple(self.positions(node, d) for d in range(len(spec.shape or ())))
            for node, spec in zip(placeholders, self.program.inputs, strict=True)
        )

    def _output_slices(self) -> tuple[Slices, ...]:
        results: Any = self.program.graph.output_node().args[0]
        # A final state that leaves the model as it is got its external size back.
        kept = {r.operand for r in self.neurons.readers if r.kind == "state"}
        return tuple(
            tuple(self.positions(r, d) for d in range(r.meta["val"].dim()))
            if isinstance(r, fx.Node) and r not in kept
            else ()
            for r in results
        )

    def _neurons(self) -> Neurons:
        """The analysis over the smaller program's nodes, for the masks that are left."""

        def small(ids: Tensor, operand: fx.Node) -> Tensor:
            """An array over an operand loses what the operand lost, be it for other neurons."""
            for d in range(ids.dim()):
                positions = self.positions(operand, d) if ids.shape[d] > 1 else None
                if positions is not None:
                    ids = ids.index_select(d, positions)
            return ids

        blocks = tuple(
            replace(
                b,
                operand=self.twins[b.operand],
                consumer=self.twins[b.consumer],
                sources=small(b.sources, b.operand),
                destinations=small(b.destinations, b.operand),
            )
            for b in self.neurons.blocks
        )
        readers = tuple(
            Reader(self.twins[r.node], self.twins[r.operand], small(r.neurons, r.operand), r.kind)
            for r in self.neurons.readers
            if r.kind != "state"
        )
        return replace(
            self.neurons, blocks=blocks, readers=readers, labels={}, owned={}, entries=()
        )


def _smaller_inputs(
    inputs: tuple[InputSpec, ...], slices: tuple[Slices, ...]
) -> tuple[InputSpec, ...]:
    return tuple(
        replace(
            spec,
            shape=tuple(
                size if kept is None else len(kept)
                for size, kept in zip(spec.shape, positions, strict=True)
            ),
        )
        if spec.shape is not None
        else spec
        for spec, positions in zip(inputs, slices, strict=True)
    )


def _smaller_call(call: Call, slices: tuple[Slices, ...]) -> Call:
    leaves, structure = pytree.tree_flatten(call)
    small = [
        _sliced(leaf, positions) if isinstance(leaf, Tensor) else leaf
        for leaf, positions in zip(leaves, slices, strict=True)
    ]
    result: Call = pytree.tree_unflatten(small, structure)
    return result


def _replace_state(entry: Entry, consumer: fx.Node, state: fx.Node, entered: fx.Node) -> None:
    """Only the state arguments: what else the layer reads may be the same value."""
    cells = operation_name(entry.consumer) in ("lstm_cell",)
    if cells:
        states = [entered if s is state else s for s in consumer.args[1]]  # type: ignore[union-attr]
        consumer.update_arg(1, states)
        return
    for position in (1, 2) if operation_name(entry.consumer) == "lstm" else (1,):
        if consumer.args[position] is state:
            consumer.update_arg(position, entered)


def _own(tensor: Tensor, slices: Slices) -> Tensor:
    """A tensor of its own, sliced; parameters stay parameters."""
    owned = _sliced(tensor.detach(), slices)
    if owned.data_ptr() == tensor.data_ptr() or owned.is_inference():
        owned = owned.clone()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(owned, requires_grad=tensor.requires_grad)
    return owned


def _sliced(tensor: Tensor, slices: Slices) -> Tensor:
    for dim, positions in enumerate(slices):
        if positions is not None:
            tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor
