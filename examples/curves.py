"""What the pruning curves of the examples share: sessions, tables and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from matplotlib.figure import Figure
from rich.table import Table

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


def open_session(path: Path) -> Any:  # onnxruntime ships no annotations
    """Open an ONNX file in onnxruntime, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # published files may hold initializers that nothing reads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def make_table(title: str, heads: str, rows: Iterable[Sequence[str]]) -> Table:
    """Build a table of numbers; ``heads`` are separated by bars."""
    table = Table(title=title)
    for head in heads.split("|"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def curve_options(description: str, data_help: str) -> argparse.ArgumentParser:
    """Command line of a script that measures a pruning curve."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help=data_help)
    sparsity_help = "fractions of the neurons to remove; 0 always comes first"
    parser.add_argument("--sparsity", type=float, nargs="*", default=SPARSITIES, help=sparsity_help)
    epochs_help = "also fine-tune each pruned model for so many epochs (default: 0, no training)"
    parser.add_argument("--epochs", type=int, default=0, help=epochs_help)
    parser.add_argument("--keep", type=Path, help="existing folder in which to keep the ONNX files")
    parser.add_argument("--plot", type=Path, help="draw the curve into this file, such as a .png")
    return parser


def draw_curve(
    path: Path,
    title: str,
    sparsities: Sequence[float],
    quality: Mapping[str, Sequence[float]],
    cost: Mapping[str, Sequence[float]],
) -> None:
    """Draw quality and cost over the fraction of neurons removed.

    Args:
        path: picture to write.
        title: what was pruned.
        sparsities: fractions removed, the unpruned model first.
        quality: curves to draw as they are, as fractions.
        cost: curves to draw as fractions of their first value.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    removed = [100 * sparsity for sparsity in sparsities]
    relative = {name: [v / values[0] for v in values] for name, values in cost.items()}
    panels = (("quality, %", quality), ("% of the unpruned model", relative))
    for axes, (label, curves) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, values in curves.items():
            axes.plot(removed, [100 * value for value in values], marker="o", label=name)
        axes.set(xlabel="neurons removed, %", ylabel=label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
