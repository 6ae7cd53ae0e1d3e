"""Writing nodes and constants into an ONNX graph, and reading constants out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import FOLDED_FROM_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from numpy.typing import NDArray

__all__ = ["Constants", "Emitter", "constant_array", "produced_by", "replace_value"]


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The content of an initializer or ``Constant`` node; None for anything else."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def produced_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value``, if it is this ONNX operation."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Lets every reader of ``old``, the graph's outputs included, read ``new``."""
    new.shape = old.shape if new.shape is None else new.shape
    new.type = old.type if new.type is None else new.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


class Constants:
    """Adds initializers to a graph, each derived tensor once however often it is asked for."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._derived: dict[Hashable, ir.Value] = {}
        self._taken = {v.name for v in graph.inputs} | set(graph.initializers)
        self._taken |= {v.name for n in graph.all_nodes() for v in n.outputs}

    def add(self, array: NDArray[Any], name: str) -> ir.Value:
        """Adds an array under ``name``, or ``name_1`` and so on where that is taken."""
        unique, count = name, 0
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        tensor = ir.Tensor(np.asarray(array, order="C"), name=unique)
        value = ir.Value(
            name=unique,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def ints(self, *values: int) -> ir.Value:
        """A one-dimensional int64 constant."""
        return self.derived(("ints", values), lambda: np.array(values, dtype=np.int64), "ints")

    def scalar(self, value: float, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A constant without dimensions."""
        return self.derived(
            ("scalar", value, dtype), lambda: np.array(value, dtype.numpy()), "scalar"
        )

    def derived(self, key: Hashable, compute: Callable[[], NDArray[Any]], name: str) -> ir.Value:
        """The constant made before under ``key``, or a new one."""
        if key not in self._derived:
            self._derived[key] = self.add(compute(), name)
        return self._derived[key]

    def weight(self, key: Hashable, compute: Callable[[], NDArray[Any]], source: str) -> ir.Value:
        """As :meth:`derived`, named after a parameter, whose own name it gets if that vanishes."""
        value = self.derived(key, compute, source)
        value.meta[FOLDED_FROM_KEY] = {source}
        return value


class Emitter:
    """Writes nodes into a graph just before a given node."""

    def __init__(self, before: ir.Node, constants: Constants) -> None:
        self._before = before
        self.constants = constants

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Adds a node with one output and returns that."""
        return self.multiple(op_type, *inputs, outputs=1, **attributes)[0]

    def multiple(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Adds a node with several outputs and returns them."""
        node = ir.node(op_type, inputs, attributes=attributes, num_outputs=outputs)
        graph = self._before.graph
        assert graph is not None
        graph.insert_before(self._before, node)
        return node.outputs

    def squeeze(self, x: ir.Value, axis: int) -> ir.Value:
        """Drops one dimension of size 1."""
        return self("Squeeze", x, self.constants.ints(axis))

    def unsqueeze(self, x: ir.Value, axis: int) -> ir.Value:
        """Adds one dimension of size 1."""
        return self("Unsqueeze", x, self.constants.ints(axis))

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        """Joins along a dimension; a single part is returned as it is."""
        return parts[0] if len(parts) == 1 else self("Concat", *parts, axis=axis)
