"""``fxprune.inspect``: what could be pruned of a model, and what not and why."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx

from fxprune.analysis.classes import distinct
from fxprune.files import write_whole
from fxprune.paths import as_path
from fxprune.tables import render_pairs, render_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxprune.analysis.neurons import Block, Group, Neurons
    from fxprune.program import Program, Refusal

__all__ = ["View", "connection_graph", "inspect"]

_SHOWN = 60  # rows of a table; the rest is in the fields


@dataclass(frozen=True)
class View:
    """What could be pruned of a model; ``str()`` is a table.

    Attributes:
        groups: the neuron groups, in execution order: ``name``, ``size``, ``recurrent``,
            ``frozen`` and ``reason`` tell what matters of each.
        blocks: the blocks of connections, in execution order: ``name``, ``source``,
            ``destination``, ``connection_class`` and ``shape``.
        graph: groups as nodes and blocks as edges, see :func:`connection_graph`.
        refusals: what has to stay as it is, and why.
    """

    groups: tuple[Group, ...]
    blocks: tuple[Block, ...]
    graph: nx.MultiDiGraph
    refusals: tuple[Refusal, ...]

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draws groups as boxes and blocks as arrows between them.

        Args:
            path: the picture; its suffix says the format, such as ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            ConfigError: the format is unknown, or the file cannot be written.
        """
        from fxprune.drawing import draw

        draw(self.graph, path)

    def write_graphml(self, path: str | os.PathLike[str]) -> None:
        """Writes :attr:`graph` as GraphML, which graph editors read.

        Raises:
            ConfigError: the file cannot be written.
        """
        target, buffer = as_path(path), io.BytesIO()
        nx.write_graphml(self.graph, buffer)
        write_whole(target, buffer.getvalue())

    def __repr__(self) -> str:
        free = sum(int(group.free.sum()) for group in self.groups)
        return f"View({len(self.groups)} groups, {free:,} neurons that may go; print it)"

    def __str__(self) -> str:
        sections = [_summary(self), _table_of_groups(self), _table_of_blocks(self)]
        if self.refusals:
            rows = [(refusal.node, refusal.reason) for refusal in self.refusals]
            sections.append(render_table(("stays as it is", "reason"), rows, limit=_SHOWN))
        return "\n\n".join(sections)


def inspect(
    model_or_program: nn.Module | Program,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
) -> View:
    """Finds the neurons of a model, the connections between them, and what has to stay.

    Args:
        model_or_program: a module, or a program from ``fxprune.trace`` or ``fxprune.load``.
        example_inputs: one call's inputs, as for ``fxprune.trace``; for a module only.
        dynamic_shapes: which dimensions may vary, as for ``fxprune.trace``; for a module only.

    Returns:
        The view.

    Raises:
        ConfigError: example inputs are missing, or given for a program.
        TraceError: the model cannot be traced; the message names the place and the remedy.

    Example:
        >>> view = inspect(torch.nn.GRU(3, 4), torch.zeros(5, 1, 3))  # doctest: +SKIP
        >>> print(view)  # doctest: +SKIP
    """
    from fxprune.analysis import analyze
    from fxprune.compiler import as_program

    program = as_program(model_or_program, example_inputs, dynamic_shapes)
    return view_of(program, analyze(program))


def view_of(program: Program, neurons: Neurons) -> View:
    """The view of a program that is analysed already."""
    return View(
        groups=neurons.groups,
        blocks=neurons.blocks,
        graph=connection_graph(neurons.groups, neurons.blocks),
        refusals=(*program.refusals, *neurons.refusals),
    )


def connection_graph(groups: tuple[Group, ...], blocks: tuple[Block, ...]) -> nx.MultiDiGraph:
    """Makes the graph of groups and blocks, with plain attributes (str, int, bool).

    A node is a group: ``size``, ``recurrent``, ``frozen``, ``reason``, and ``order`` of execution.
    Where a block begins or ends at no neurons (the rows of an embedding, attention heads of a
    fixed size) it has a node of its own there, whose ``kind`` is ``"inputs"`` or ``"outputs"``
    instead of ``"neurons"``. An edge is a block, its key the block's name: ``weight``,
    ``connection_class``, ``shape`` and the number of ``connections``.

    Args:
        groups: the neuron groups.
        blocks: the blocks between them.
    """
    graph = nx.MultiDiGraph()
    for order, group in enumerate(groups):
        graph.add_node(
            group.name,
            kind="neurons",
            size=group.size,
            recurrent=group.recurrent,
            frozen=group.frozen,
            reason=group.reason,
            order=order,
        )
    for block in distinct(blocks):
        source = block.source or f"inputs of {block.weight}"
        destination = block.destination or f"outputs of {block.weight}"
        if not block.source:
            _add_end(graph, source, "inputs", block, block.destinations, -1)
        if not block.destination:
            _add_end(graph, destination, "outputs", block, block.sources, len(groups))
        graph.add_edge(
            source,
            destination,
            key=block.name,
            weight="+".join(block.weights),
            connection_class=block.connection_class.value,
            shape=" x ".join(str(n) for n in block.shape),
            connections=math.prod(block.shape),
        )
    return graph


def _add_end(
    graph: nx.MultiDiGraph, name: str, kind: str, block: Block, far: Tensor, order: int
) -> None:
    """Adds the end of a block where there are no neurons."""
    graph.add_node(
        name,
        kind=kind,
        size=math.prod(block.shape) // max(1, far.numel()),
        recurrent=False,
        frozen=True,
        reason="they are no neurons",
        order=order,
    )


def _summary(view: View) -> str:
    neurons = sum(group.size for group in view.groups)
    free = sum(int(group.free.sum()) for group in view.groups)
    by_class: Counter[str] = Counter()
    for block in distinct(view.blocks):
        by_class[block.connection_class.value] += math.prod(block.shape)
    classes = ", ".join(f"{number:,} {kind}" for kind, number in by_class.items())
    return render_pairs(
        [
            ("neurons", f"{neurons:,} in {len(view.groups):,} groups; {free:,} may be removed"),
            ("connections", f"{by_class.total():,}" + (f": {classes}" if classes else "")),
        ]
    )


def _table_of_groups(view: View) -> str:
    columns = ("group", "neurons", "removable", "recurrent", "the rest stays because")
    rows = [(g.name, g.size, int(g.free.sum()), g.recurrent, g.reason) for g in view.groups]
    return render_table(columns, rows, limit=_SHOWN)


def _table_of_blocks(view: View) -> str:
    columns = ("connections", "from", "to", "class", "shape")
    rows = [
        (b.name, b.source, b.destination, b.connection_class.value, " x ".join(map(str, b.shape)))
        for b in distinct(view.blocks)
    ]
    return render_table(columns, rows, limit=_SHOWN)
