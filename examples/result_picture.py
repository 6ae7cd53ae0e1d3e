"""What pruning costs as a picture: accuracy against the connections that are left."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator, PercentFormatter

from examples.result_lines import Run

Curve = dict[Hashable, list[tuple[float, float]]]
"""For each sparsity asked for, of each run: the fraction of connections left, and the change of
accuracy in points."""

LEFT = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Marks on the axis of what is left."""

CHANGES = (0.5, 0, -0.5, -1, -2, -5, -10, -20, -50)
"""Marks on the other, in points."""


def curves(
    runs: Sequence[Run], key: Callable[[Run], tuple[str, Hashable] | None]
) -> dict[str, dict[str, Curve]]:
    """Curves by method, by model, against the dense model of the same setting and seed.

    A model of which there is no curve, at most points of one sparsity, is left out.

    Args:
        runs: lines of a results file, with accuracy in percent and the fraction removed.
        key: method and sparsity of a run; ("dense", ...) for a dense one, None to leave it out.
    """
    keys = [(run, key(run)) for run in runs]
    dense = {_compared(run): run["accuracy"] for run, at in keys if at and at[0] == "dense"}
    found: dict[str, dict[str, Curve]] = {}
    for run, at in keys:
        if at is None or at[0] == "dense" or _compared(run) not in dense:
            continue
        model = f"{run['setting']['model']}, {run['setting']['epochs']} epochs"
        curve = found.setdefault(model, {}).setdefault(at[0], {})
        point = (1 - run["removed"], run["accuracy"] - dense[_compared(run)])
        curve.setdefault(at[1], []).append(point)
    return {m: of for m, of in found.items() if any(len(curve) > 1 for curve in of.values())}


def _compared(run: Run) -> tuple[object, ...]:
    return *run["setting"].values(), run["seed"]


def draw_changes(path: Path, panels: Mapping[str, Mapping[str, Curve]]) -> None:
    """Draw a point for each run and a line through the means, for several models side by side.

    Changes are drawn on a scale that is linear down to one point and logarithmic below.

    Args:
        path: picture to write; its suffix says the format.
        panels: curves by method, by model. "method, variant" is dashed, in the method's color.
    """
    figure = Figure(figsize=(2.0 + 3.2 * len(panels), 3.8), layout="constrained")
    styles = _styles(method for of in panels.values() for method in of)
    first: Axes | None = None
    for number, (model, of) in enumerate(panels.items()):
        axes = figure.add_subplot(
            1, len(panels), number + 1, title=model, xscale="log", sharey=first
        )
        first = first or axes
        axes.set(xlabel="connections left", ylabel="" if number else "change of accuracy, points")
        axes.set_yscale("symlog", linthresh=1.0)
        for method, curve in of.items():
            runs = [run for at in curve.values() for run in at]
            means = [(mean(x for x, _ in at), mean(y for _, y in at)) for at in curve.values()]
            xs, ys = zip(*runs, strict=True)
            axes.scatter(xs, ys, s=9, color=styles[method]["color"], alpha=0.5)
            axes.plot(*zip(*sorted(means), strict=True), **styles[method])
        _mark(axes, [x for curve in of.values() for at in curve.values() for x, _ in at])
    keys = [Line2D([], [], marker=".", label=method, **style) for method, style in styles.items()]
    figure.legend(handles=keys, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def _mark(axes: Axes, left: Sequence[float]) -> None:
    """Scales, so that pruning goes to the right, and the line of no change."""
    axes.xaxis.set_major_locator(FixedLocator(LEFT))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(FixedLocator(CHANGES))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xlim(max(left) * 1.3, min(left) / 1.3)
    axes.axhline(0.0, color="grey", linewidth=0.8, linestyle=":")


def _styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each line is drawn, those of one method next to each other."""
    known = sorted(set(methods))
    names = list(dict.fromkeys(method.partition(",")[0] for method in known))
    return {
        method: {
            "color": f"C{names.index(method.partition(',')[0])}",
            "linestyle": "--" if "," in method else "-",
        }
        for method in known
    }
