"""Inputs to time an ONNX file on, made from what the file says about them.

Floating inputs are normally distributed. Integers must mean something to the model, so each is
followed to its use: indices of a table are drawn from its rows, lengths of sequences are full.
Any other integer is 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["dynamic_sizes", "make_inputs"]

_DEFAULT_SIZES = {"batch": 1, "time": 35}
_OTHER_SIZE = 16

_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
_INTEGERS = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}

_LENGTHS = -1  # what _meaning gives for lengths of sequences
_CARRIERS = {"Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Slice"}


def dynamic_sizes(inputs: Sequence[Any], sizes: Mapping[str, int]) -> dict[str, int]:
    """A size for every named dimension of a session's inputs: as given, or the default."""
    names = [d for given in inputs for d in given.shape if isinstance(d, str)]
    return {name: sizes.get(name, _default_size(name)) for name in dict.fromkeys(names)}


def make_inputs(
    path: Path, inputs: Sequence[Any], sizes: Mapping[str, int]
) -> dict[str, NDArray[Any]]:
    """Arrays for the inputs of a session, the same ones each time.

    Args:
        path: the ONNX file.
        inputs: the session's inputs.
        sizes: of the dynamic dimensions.
    """
    generator = np.random.default_rng(0)
    shapes = {
        i.name: tuple(sizes[d] if isinstance(d, str) else d or 1 for d in i.shape) for i in inputs
    }
    integers = [i.name for i in inputs if i.type in _INTEGERS and i.type != "tensor(bool)"]
    meanings = _meanings(path, integers) if integers else {}
    feed: dict[str, NDArray[Any]] = {}
    for given in inputs:
        shape = shapes[given.name]
        if given.type in _INTEGERS:
            meaning = meanings.get(given.name, 1)
            limit = _time_of(inputs, sizes, given.name) if meaning == _LENGTHS else meaning
            values = (
                np.full(shape, limit)
                if meaning == _LENGTHS
                else generator.integers(limit, size=shape)
            )
            feed[given.name] = values.astype(_INTEGERS[given.type])
        else:
            kind = _FLOATS.get(given.type, np.float32)
            feed[given.name] = generator.standard_normal(shape).astype(kind)
    return feed


def _default_size(name: str) -> int:
    return next((n for part, n in _DEFAULT_SIZES.items() if part in name), _OTHER_SIZE)


def _time_of(inputs: Sequence[Any], sizes: Mapping[str, int], lengths: str) -> int:
    """The steps of the sequences that lengths count."""
    named = [size for name, size in sizes.items() if "time" in name]
    if named:
        return named[0]
    # Then it is fixed: of the first two dimensions of a sequence, the one that is not the batch.
    batch = next((i.shape[0] for i in inputs if i.name == lengths and i.shape), None)
    for given in inputs:
        steps = [d for d in given.shape[:2] if d != batch and isinstance(d, int)]
        if len(given.shape) >= 2 and steps:
            return int(steps[0])
    return 1


def _meanings(path: Path, names: Sequence[str]) -> dict[str, int]:
    """For each integer input the rows of the table it indexes, or :data:`_LENGTHS`."""
    graph = onnx.load(str(path), load_external_data=False).graph
    tables = {t.name: t.dims for t in graph.initializer}
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for position, name in enumerate(node.input):
            users[name].append((node, position))
    return {name: found for name in names if (found := _meaning(name, users, tables)) is not None}


def _meaning(
    name: str,
    users: Mapping[str, Sequence[tuple[onnx.NodeProto, int]]],
    tables: Mapping[str, Sequence[int]],
) -> int | None:
    waiting, seen = [name], {name}
    while waiting:
        for node, position in users.get(waiting.pop(), ()):
            if node.op_type in ("LSTM", "GRU", "RNN") and position == 4:
                return _LENGTHS
            if node.op_type == "Gather" and position == 1 and node.input[0] in tables:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                return int(tables[node.input[0]][axis])
            if node.op_type in _CARRIERS and position == 0:
                waiting.extend(output for output in node.output if output not in seen)
                seen.update(node.output)
    return None
