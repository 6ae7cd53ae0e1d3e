"""Weights of recurrent layers in the layout of the ONNX recurrent operations.

ONNX stacks the gates of an LSTM as i, o, f, g and of a GRU as z, r, n, where PyTorch has i, f, g,
o and r, z, n, and puts a dimension for the direction in front::

    W [directions, gates * hidden, inputs]      R [directions, gates * hidden, hidden]
    B [directions, 2 * gates * hidden]          the input bias, then the recurrent one

A projected LSTM has outputs w_hr h for the unprojected h = o * tanh(c), and reads them back
through w_hh. As w_hh (w_hr h) = (w_hh w_hr) h, an ordinary LSTM over h with R = w_hh w_hr does the
same, and a multiplication of its results by w_hr gives the outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fxprune.lowering.building import Emitter, constant_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from fxprune.lowering.markers import Layer

__all__ = ["Weights", "hidden_size", "inverse_projection"]

_GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
_WORST_CONDITION = 1e3  # beyond this, going through the pseudo-inverse costs too many digits


def hidden_size(layer: Layer) -> int:
    """Units of a layer; behind a projection there may be fewer outputs."""
    return _sizes(layer.w_hh)[0] // len(_GATE_ORDER[layer.kind])


def inverse_projection(layer: Layer) -> NDArray[Any] | None:
    """The matrix that takes h_0 to an unprojected state, [outputs, hidden].

    None where there is none: the projection is not constant, lacks full row rank, or nearly so.
    """
    w_hr = constant_array(layer.w_hr)
    if w_hr is None or w_hr.shape[0] > w_hr.shape[1]:
        return None
    exact = w_hr.astype(np.float64)
    if np.linalg.cond(exact) > _WORST_CONDITION:
        return None
    return np.linalg.pinv(exact).T.astype(w_hr.dtype)


class Weights:
    """Lays out the weights of one layer, or of two that share one bidirectional node.

    Args:
        layers: the directions.
        emit: writes the layout as nodes where a weight is not constant.
    """

    def __init__(self, layers: Sequence[Layer], emit: Emitter) -> None:
        self._layers = layers
        self._emit = emit
        self._order = _GATE_ORDER[layers[0].kind]
        self._hidden = hidden_size(layers[0])

    def input(self, with_state: bool) -> ir.Value:
        """W; ``with_state`` appends w_hh, for an h_0 that enters as an input."""
        if with_state:
            parts = [(layer.w_ih, layer.w_hh) for layer in self._layers]
            return self._layout("W+", parts, lambda o, w, u: o.rows(o.join([w, u], 1)))
        return self._layout("W", [(layer.w_ih,) for layer in self._layers], lambda o, w: o.rows(w))

    def recurrent(self) -> ir.Value:
        """R, with the projection folded in."""
        if self._layers[0].w_hr is None:
            parts = [(layer.w_hh,) for layer in self._layers]
            return self._layout("R", parts, lambda o, w: o.rows(w))
        folded = [(layer.w_hh, layer.w_hr) for layer in self._layers]
        return self._layout("R", folded, lambda o, w, p: o.product(o.rows(w), p))

    def bias(self) -> ir.Value | None:
        """B, or None if no direction has biases."""
        pairs = [(layer.b_ih, layer.b_hh) for layer in self._layers]
        if all(b is None for pair in pairs for b in pair):
            return None
        filled = [tuple(self._zeros() if b is None else b for b in pair) for pair in pairs]
        return self._layout("B", filled, lambda o, b, c: o.join([o.rows(b), o.rows(c)], 0))

    def projection(self) -> ir.Value:
        """w_hr of every direction, transposed: [directions, hidden, outputs]."""
        parts = [(layer.w_hr,) for layer in self._layers]
        return self._layout("P", parts, lambda o, w: o.transposed(w))

    def _zeros(self) -> ir.Value:
        like = constant_array(self._layers[0].w_hh)
        size = len(self._order) * self._hidden
        dtype = np.float32 if like is None else like.dtype
        return self._emit.constants.derived(
            ("zeros", size, dtype), lambda: np.zeros(size, dtype), "no_bias"
        )

    def _layout(
        self, role: str, parts: Sequence[Sequence[Any]], write: Callable[..., Any]
    ) -> ir.Value:
        """Writes one layout for every direction and stacks them, at once where all is constant."""
        sources = [value for part in parts for value in part]
        arrays = [[constant_array(value) for value in part] for part in parts]
        if any(array is None for part in arrays for array in part):
            nodes = _Nodes(self._order, self._hidden, self._emit)
            return nodes.stack([write(nodes, *part) for part in parts])
        numbers = _Numbers(self._order)
        return self._emit.constants.weight(
            (role, self._order, *map(id, sources)),
            lambda: np.stack([write(numbers, *part) for part in arrays]),
            sources[0].name,
        )


class _Numbers:
    """The steps of a layout on arrays."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def rows(self, w: NDArray[Any]) -> NDArray[Any]:
        blocks = np.split(w, len(self._order))
        return np.concatenate([blocks[gate] for gate in self._order])

    def join(self, parts: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
        return np.concatenate(parts, axis)

    def product(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        product: NDArray[Any] = a.astype(np.float64) @ b.astype(np.float64)
        return product.astype(a.dtype)

    def transposed(self, w: NDArray[Any]) -> NDArray[Any]:
        return w.T


class _Nodes:
    """The same steps as nodes, for weights that the model computes from its inputs."""

    def __init__(self, order: Sequence[int], hidden: int, emit: Emitter) -> None:
        rows = [gate * hidden + unit for gate in order for unit in range(hidden)]
        self._rows = emit.constants.ints(*rows)
        self._emit = emit

    def rows(self, w: ir.Value) -> ir.Value:
        return self._emit("Gather", w, self._rows, axis=0)

    def join(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        return self._emit.concat(parts, axis)

    def product(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._emit("MatMul", a, b)

    def transposed(self, w: ir.Value) -> ir.Value:
        return self._emit("Transpose", w, perm=[1, 0])

    def stack(self, parts: Sequence[ir.Value]) -> ir.Value:
        return self._emit.concat([self._emit.unsqueeze(p, 0) for p in parts], 0)


def _sizes(weight: ir.Value) -> tuple[int, ...]:
    assert weight.shape is not None  # weights have fixed sizes
    return tuple(weight.shape.numpy())
