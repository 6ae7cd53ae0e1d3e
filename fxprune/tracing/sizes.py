"""Example inputs at other sizes, for checking what a program does there.

A program's dynamic dimensions carry symbols; inputs that share a symbol vary together. Other
sizes are made from the example by cropping and tiling, so that values stay plausible: tokens stay
in the vocabulary, and lengths are clipped to the new time and stay sorted if they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.errors import ConfigError
from fxprune.operations import argument, dims_of, operation_name
from fxprune.tracing import packing, recurrent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fxprune.calls import Call
    from fxprune.program import Program

__all__ = [
    "at_sizes",
    "candidate_sizes",
    "check_example",
    "example_sizes",
    "length_inputs",
    "size_label",
    "squeezed_symbols",
]

_LENGTHS_ARGUMENT = {recurrent.lstm: 8, recurrent.gru: 6, recurrent.rnn: 6, packing.pad_packed: 1}


def check_example(call: Call) -> None:
    """Refuses an example of which no other sizes can be made.

    Raises:
        ConfigError: a tensor in it is empty.
    """
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, Tensor) and not leaf.numel():
            raise ConfigError(
                f"an example input of shape {tuple(leaf.shape)} is empty, and shows nothing of "
                "what the model computes. Give an example in which no size is 0."
            )


def example_sizes(program: Program) -> dict[str, int]:
    """The size of every dynamic symbol in the program's example inputs."""
    sizes: dict[str, int] = {}
    leaves = pytree.tree_leaves(program.example)
    for leaf, spec in zip(leaves, program.inputs, strict=True):
        for dim, symbol in enumerate(spec.shape or ()):
            if isinstance(symbol, str):
                sizes.setdefault(symbol, leaf.shape[dim])
    return {s: n for s, n in sizes.items() if s.isidentifier()}


def squeezed_symbols(program: Program) -> set[str]:
    """Symbols of dimensions that the model squeezes and that the example has at size 1.

    There the model's value loses a dimension, at every other size it does not. The trace, which
    takes no dynamic size for 1, keeps it: its value has the rank of other sizes.
    """
    found: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and operation_name(node) in ("squeeze", "squeeze_"):
            for size in _squeezed_sizes(node):
                if isinstance(size, torch.SymInt) and size.node.hint == 1:
                    found.update(str(symbol) for symbol in size.node.expr.free_symbols)
    return found


def _squeezed_sizes(node: fx.Node) -> list[Any]:
    """The sizes along the dimensions that a squeeze names; all of them if it names none."""
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    return [shape[d] for d in sorted(dims_of(argument(node, "dim"), len(shape)))]


def candidate_sizes(example: Mapping[str, int]) -> list[dict[str, int]]:
    """Assignments worth trying, the most different first: odd, small, large, each alone at 1."""
    symbols = list(example)
    if not symbols:
        return []

    def vary(change: Any) -> dict[str, int]:
        return {s: max(1, change(i, n)) for i, (s, n) in enumerate(example.items())}

    tries = [
        vary(lambda i, n: n + 2 + i),
        vary(lambda i, n: 1),
        vary(lambda i, n: 3 if i == 0 else n + n // 2),
        vary(lambda i, n: 2 * n),
        vary(lambda i, n: n - 1 - i),
        vary(lambda i, n: 3 if i == 0 else n),
        vary(lambda i, n: 1 if i == 0 else n),
        vary(lambda i, n: n if i == 0 else 2 * n),
        vary(lambda i, n: n if i == 0 else 1),
    ]
    unique: list[dict[str, int]] = []
    for sizes in tries:
        if sizes != dict(example) and sizes not in unique:
            unique.append(sizes)
    return unique


def size_label(sizes: Mapping[str, int], names: Mapping[str, str]) -> str:
    """Sizes in words, such as ``"batch=3, time=7"``."""
    return ", ".join(f"{names.get(s, s)}={n}" for s, n in sizes.items())


def at_sizes(program: Program, sizes: Mapping[str, int], call: Call | None = None) -> Call:
    """A call of the program at other sizes.

    Args:
        program: whose example and dimensions are used.
        sizes: the wanted size of each symbol; others stay.
        call: a call to start from instead of the program's example.
    """
    leaves, structure = pytree.tree_flatten(call or program.example)
    limits = length_inputs(program)
    resized = []
    for leaf, spec in zip(leaves, program.inputs, strict=True):
        if isinstance(leaf, Tensor):
            was = leaf
            for dim, symbol in enumerate(spec.shape or ()):
                if isinstance(symbol, str) and symbol in sizes:
                    leaf = _resize(leaf, dim, sizes[symbol])
            if spec.name in limits:
                leaf = _fit_lengths(leaf, was, sizes.get(limits[spec.name]))
        resized.append(leaf)
    result: Call = pytree.tree_unflatten(resized, structure)
    return result


def _resize(x: Tensor, dim: int, size: int) -> Tensor:
    index = torch.arange(size, device=x.device) % x.shape[dim]
    return x.index_select(dim, index)


def _fit_lengths(lengths: Tensor, was: Tensor, time: int | None) -> Tensor:
    if time is not None:
        lengths = lengths.clamp(max=time)
        if time > int(was.max()) and lengths.numel():
            # The longest sequence of a packed batch usually fills the time given.
            lengths = lengths + (time - int(lengths.max())) * (lengths == lengths.max())
    descending = bool((was[:-1] >= was[1:]).all())
    return lengths.sort(descending=True).values if descending else lengths


def length_inputs(program: Program) -> dict[str, str]:
    """Inputs that hold sequence lengths, each with the symbol of the time it counts."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        position = _LENGTHS_ARGUMENT.get(node.target) if node.op == "call_function" else None
        if position is None or len(node.args) <= position:
            continue
        lengths, sequence = node.args[position], node.args[0]
        if isinstance(lengths, fx.Node):
            source = _source(lengths)
            if source.op == "placeholder":
                found.setdefault(source.name, str(sequence.meta["val"].shape[0]))
    return found


def _source(node: fx.Node) -> fx.Node:
    """Follows conversions and copies to where a tensor comes from."""
    names = (
        "to",
        "_to_copy",
        "clone",
        "contiguous",
        "clamp",
        "clamp_min",
        "cpu",
        "view",
        "reshape",
    )
    while node.op == "call_function" and isinstance(node.args[0], fx.Node):
        if operation_name(node) not in names:
            break
        node = node.args[0]
    return node
