"""The runs of the stage-wise example as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from examples.result_lines import Run, markdown, spread

CLASSES = ("feedforward", "input", "recurrent")
HEADS = (
    "method|seeds|perplexity|of dense|accuracy|sparsity|feed-forward|input|recurrent|"
    "non-zeros|epochs|evaluations"
)


def by_method(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    """The runs of each method, in the order in which methods first appear."""
    for method in dict.fromkeys(run["method"] for run in runs):
        yield method, [run for run in runs if run["method"] == method]


def table(runs: Sequence[Run]) -> str:
    """Mean and spread over the seeds on the test text, a row for each method, in Markdown.

    "of dense" is the perplexity as a multiple of the dense model's of the same seed. Epochs and
    evaluations are those that were used, searches and epochs together.
    """
    dense = {run["seed"]: run["test_perplexity"] for run in runs if run["method"] == "dense"}
    rows = []
    for method, of in by_method(runs):
        shares = [[run["by_class"].get(kind, 0.0) for run in of] for kind in CLASSES]
        spent = [run["spent"] for run in of if "spent" in run]
        rows.append(
            [
                method,
                str(len(of)),
                spread([run["test_perplexity"] for run in of], ".3f"),
                spread([run["test_perplexity"] / dense[run["seed"]] for run in of], ".3f"),
                spread([run["test_accuracy"] for run in of], ".2%"),
                spread([run["sparsity"] for run in of], ".2%"),
                *(spread(share, ".1%") for share in shares),
                spread([run["nonzeros"] for run in of], ",.0f"),
                f"{mean(s['epochs'] for s in spent):.1f}" if spent else "",
                f"{mean(s['evaluations'] for s in spent):.0f}" if spent else "",
            ]
        )
    return markdown(HEADS, rows)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw perplexity against sparsity, a point for each run, into a file."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(
        xlabel="connections removed (%)", ylabel="test perplexity, of the dense model's"
    )
    dense = {run["seed"]: run["test_perplexity"] for run in runs if run["method"] == "dense"}
    for method, of in by_method(runs):
        if method.startswith("dense"):
            continue
        curve = method.startswith("gradual ")
        axes.plot(
            [100 * run["sparsity"] for run in of],
            [run["test_perplexity"] / dense[run["seed"]] for run in of],
            "kx" if curve else "o",
            label=None if curve else method,
            alpha=0.8,
        )
    axes.plot([], [], "kx", label="gradual, sparsity given")
    axes.axhline(1.01, color="grey", linewidth=0.8, linestyle="--")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
