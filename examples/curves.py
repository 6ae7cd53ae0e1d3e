"""What the pruning curves of the examples share: sessions, tables and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import onnxruntime as ort
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Quality = TypeVar("Quality")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Point(Generic[Quality]):
    """One row of a pruning curve.

    Attributes:
        sparsity: fraction of the neurons that was asked to go.
        state: units of the state that goes from call to call.
        parameters: of the whole model.
        macs: multiply-accumulate operations of the whole model on its example.
        file_bytes: of all ONNX files of the model together.
        speedup: of one call over the unpruned file, in turns, one thread.
        quality: before training.
        trained: quality after training, None where there was none.
    """

    sparsity: float
    state: int
    parameters: int
    macs: int
    file_bytes: int
    speedup: float
    quality: Quality
    trained: Quality | None


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


def size_table(title: str, macs: str, points: Sequence[Point[Any]]) -> Table:
    """Show what each sparsity costs; ``macs`` says of what the operations are."""
    heads = f"removed|state|parameters|{macs}|ONNX bytes|speed-up"
    rows = (
        (
            f"{p.sparsity:.0%}",
            f"{p.state}",
            f"{p.parameters:,}",
            f"{p.macs:,}",
            f"{p.file_bytes:,}",
            f"{p.speedup:.2f}",
        )
        for p in points
    )
    return make_table(title, heads, rows)


def print_curve(
    points: Sequence[Point[Quality]],
    sizes: Table,
    quality_table: Callable[[str, Sequence[tuple[float, Quality]]], Table],
    epochs: int,
) -> None:
    """Show sizes, and quality before and after so many epochs of training."""
    console = Console()
    console.print(sizes)
    console.print(quality_table("in one shot", [(p.sparsity, p.quality) for p in points]))
    trained = [(p.sparsity, p.trained) for p in points if p.trained is not None]
    if trained:
        console.print(quality_table(f"after training, epochs: {epochs}", trained))


def cost_curves(points: Sequence[Point[Any]], call: str) -> dict[str, list[float]]:
    """What :func:`draw_curve` is to draw as cost; ``call`` says what was timed."""
    return {
        "parameters": [float(p.parameters) for p in points],
        "MACs": [float(p.macs) for p in points],
        "ONNX bytes": [float(p.file_bytes) for p in points],
        f"time per {call}": [1 / p.speedup for p in points],
    }


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
