"""Names of dynamic dimensions as people would say them: batch, time, or input_dim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxprune.tracing import recurrent

if TYPE_CHECKING:
    from fxprune.program import Program

__all__ = ["dimension_names", "symbol_names"]

_LAYERS = (recurrent.lstm, recurrent.gru, recurrent.rnn)


def symbol_names(program: Program) -> dict[str, str]:
    """A name for every dynamic symbol of a program's inputs, each name once.

    ``batch`` and ``time`` are what the first recurrent layer takes for them, or the first
    dimension of the first input; others are named after input and dimension.
    """
    names: dict[str, str] = {}

    def give(symbol: int | str, name: str) -> None:
        if isinstance(symbol, str) and symbol not in names and name not in names.values():
            names[symbol] = name

    inputs = {s for spec in program.inputs for s in spec.shape or () if isinstance(s, str)}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _LAYERS:
            time, batch = (str(s) for s in node.args[0].meta["val"].shape[:2])
            for size, name in ((batch, "batch"), (time, "time")):
                if size in inputs:
                    give(size, name)
            break
    for spec in program.inputs:
        for dim, symbol in enumerate(spec.shape or ()):
            if dim == 0:
                give(symbol, "batch")
            give(symbol, f"{spec.name}_{dim}")
    return names


def dimension_names(program: Program) -> dict[str, dict[int, str]]:
    """For every input the names of its dynamic dimensions."""
    names = symbol_names(program)
    return {
        spec.name: {d: names[s] for d, s in enumerate(spec.shape) if isinstance(s, str)}
        for spec in program.inputs
        if spec.shape is not None
    }
