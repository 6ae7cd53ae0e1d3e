"""A picture of neuron groups and the connections between them."""

from __future__ import annotations

import io
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch

from fxprune.analysis.neurons import ConnectionClass
from fxprune.errors import ConfigError
from fxprune.files import write_whole
from fxprune.paths import as_path

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

__all__ = ["draw", "layers_of"]

# Okabe and Ito's palette: told apart with any kind of colour vision.
_COLOURS = {
    ConnectionClass.RECURRENT.value: "#D55E00",
    ConnectionClass.INPUT.value: "#0072B2",
    ConnectionClass.FEEDFORWARD.value: "#009E73",
}
_FILLS = {"recurrent": "#FBE3D3", "free": "#FFFFFF", "frozen": "#E4E4E4"}
_BOX = (2.6, 0.62)  # width, height, in inches: one unit of the drawing is one inch
_STEP = (3.1, 1.35)
_LARGEST = 200.0  # inches: beyond it the picture is scaled down

_BY_LATEX = {"pgf"}  # formats of matplotlib that need a program beside it

Place = tuple[float, float]


def draw(graph: nx.MultiDiGraph, path: str | os.PathLike[str]) -> None:
    """Draws a connection graph, in layers from top to bottom.

    A box is a neuron group with its size; frozen ones are grey, recurrent ones orange. An arrow
    is a block: its colour tells the class, its width grows with the logarithm of its connections.

    Args:
        graph: what :func:`fxprune.inspection.connection_graph` makes.
        path: the picture; its suffix says the format, such as ``.png`` or ``.svg``.

    Raises:
        ConfigError: the format is unknown, or the file cannot be written.
    """
    target = as_path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in FigureCanvasAgg.get_supported_filetypes().keys() - _BY_LATEX:
        raise ConfigError(
            f"cannot draw {target}: the suffix {target.suffix!r} is no picture format. "
            "Use .png, .svg or .pdf"
        )
    buffer = io.BytesIO()
    _figure_of(graph).savefig(buffer, format=kind, dpi=110)
    write_whole(target, buffer.getvalue())


def layers_of(graph: nx.MultiDiGraph) -> dict[str, int]:
    """The layer of each group: one below the lowest that feeds it, by order of execution.

    Connections back to an earlier group, as in a loop, do not count.
    """
    order: dict[str, int] = dict(graph.nodes(data="order"))
    layers: dict[str, int] = {}
    for name in sorted(order, key=lambda n: order[n]):
        before = [p for p in graph.predecessors(name) if order[p] < order[name]]
        layers[name] = 1 + max((layers[p] for p in before), default=-1)
    return layers


def _figure_of(graph: nx.MultiDiGraph) -> Figure:
    places, width, height = _places(graph)
    figure = Figure(figsize=(min(width, _LARGEST), min(height, _LARGEST)))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-width / 2, width / 2)
    axes.set_ylim(-height + 1.0, 1.0)
    axes.set_axis_off()
    _draw_blocks(axes, graph, places)
    for name, values in graph.nodes(data=True):
        _draw_group(axes, name, values, places[name])
    axes.legend(handles=_legend(graph), loc="upper left", fontsize=8, frameon=False)
    return figure


def _places(graph: nx.MultiDiGraph) -> tuple[dict[str, Place], float, float]:
    """Centres of the boxes, and width and height of the whole."""
    rows: dict[int, list[str]] = defaultdict(list)
    for name, layer in layers_of(graph).items():
        rows[layer].append(name)
    places: dict[str, Place] = {}
    for layer, names in rows.items():
        for column, name in enumerate(names):
            # Odd rows are shifted a little, so that arrows over several rows stay visible.
            x = (column - (len(names) - 1) / 2) * _STEP[0] + (0.3 if layer % 2 else -0.3)
            places[name] = (x, -layer * _STEP[1] - 1.0)
    widest = max((len(names) for names in rows.values()), default=1)
    return places, max(6.5, widest * _STEP[0] + 3.0), max(2.5, (len(rows) + 1) * _STEP[1] + 0.3)


def _draw_group(axes: Axes, name: str, values: Mapping[str, Any], place: Place) -> None:
    x, y = place
    kind = "frozen" if values["frozen"] else "recurrent" if values["recurrent"] else "free"
    corner = (x - _BOX[0] / 2, y - _BOX[1] / 2)
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(
        FancyBboxPatch(
            corner, *_BOX, boxstyle=style, facecolor=_FILLS[kind], edgecolor="#404040", zorder=3
        )
    )
    label = name if len(name) <= 30 else f"{name[:13]}...{name[-14:]}"
    text = f"{_plain(label)}\n{values['size']:,} {values['kind']}"
    axes.text(x, y, text, ha="center", va="center", fontsize=8, zorder=4)


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")


def _draw_blocks(axes: Axes, graph: nx.MultiDiGraph, places: Mapping[str, Place]) -> None:
    parallel: dict[tuple[str, str], int] = defaultdict(int)
    for source, destination, values in graph.edges(data=True):
        index = parallel[source, destination]
        parallel[source, destination] += 1
        colour, width = _COLOURS[values["connection_class"]], _width(values["connections"])
        if source == destination:
            _draw_loop(axes, places[source], index, colour, width)
        else:
            _draw_arrow(axes, places[source], places[destination], index, colour, width)


def _draw_arrow(
    axes: Axes, start: Place, end: Place, index: int, colour: str, width: float
) -> None:
    down = 1 if start[1] > end[1] else -1 if start[1] < end[1] else 0
    # An arrow over several rows bends around the boxes between; parallel ones fan out.
    rows = abs(start[1] - end[1]) / _STEP[1]
    bend = (0.28 if rows > 1.5 else 0.2 if down < 0 else 0.0) + 0.16 * index
    axes.add_patch(
        FancyArrowPatch(
            (start[0], start[1] - down * _BOX[1] / 2),
            (end[0], end[1] + down * _BOX[1] / 2),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=11,
            linewidth=width,
            color=colour,
            alpha=0.85,
            zorder=2,
        )
    )


def _draw_loop(axes: Axes, place: Place, index: int, colour: str, width: float) -> None:
    radius = 0.24 + 0.09 * index
    centre = (place[0] + _BOX[0] / 2 + 0.6 * radius, place[1])
    axes.add_patch(
        Circle(centre, radius, fill=False, linewidth=width, color=colour, alpha=0.85, zorder=2)
    )


def _width(connections: int) -> float:
    return 0.6 + 0.5 * math.log10(max(1, connections))


def _legend(graph: nx.MultiDiGraph) -> list[Any]:
    used = {kind for _, _, kind in graph.edges(data="connection_class")}
    lines = [
        Line2D([], [], color=c, linewidth=2, label=k) for k, c in _COLOURS.items() if k in used
    ]
    boxes = [
        Patch(facecolor=_FILLS[kind], edgecolor="#404040", label=label)
        for kind, label in (
            ("free", "may be pruned"),
            ("recurrent", "recurrent, may be pruned"),
            ("frozen", "stays"),
        )
    ]
    return [*lines, *boxes]
