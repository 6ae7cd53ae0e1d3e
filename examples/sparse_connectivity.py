"""Learn which connections of small MNIST models to keep: accuracy against what is left.

    python -m examples.sparse_connectivity --data PATH [--model lenet-300-100|lenet-5|gru]
    python -m examples.sparse_connectivity --table sparse_connectivity.jsonl [--picture curve.png]

Every method trains for the same number of epochs, from the same initial weights, with Adam, whose
rate falls to zero over the last quarter, and asks for the same fraction of connections to go:

- `learned` is sparse connectivity learning with its defaults and a target; `softplus` and
  `leaky_relu` take another slope of the unit step, `unnormalized` leaves the gradients as they are;
- `priced` is the same without a target: its knob is the price of a connection;
- `gradual` is gradual magnitude pruning;
- `magnitude` trains for half of the epochs, prunes at once, the smallest of each weight, and trains
  for the other half; `magnitude-all` prunes the smallest of all weights together;
- `dense` is the control.

Nothing is set by layer. Every run is one line of the results file, written when the run is done; a
script that was stopped goes on behind the last one. The last 5,000 training images choose the
epoch; the test images are looked at once, in the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

import fxprune
from examples.mnist import RowReader, accuracy, make_task, read_mnist
from examples.result_lines import Run, add_result, markdown, read_results, results_parser, spread
from examples.result_picture import curves, draw_changes
from fxprune.contract import Pass
from fxprune.passes import GradualMagnitude, Magnitude, SparseConnectivity
from fxprune.progress import track
from fxprune.training import fit, preserved_random_state

HELD_OUT = 5_000

METHODS: Mapping[str, Callable[[float], Pass]] = {
    "learned": lambda asked: SparseConnectivity(target=1 - asked),
    "softplus": lambda asked: SparseConnectivity(target=1 - asked, estimator="softplus"),
    "leaky_relu": lambda asked: SparseConnectivity(target=1 - asked, estimator="leaky_relu"),
    "unnormalized": lambda asked: SparseConnectivity(target=1 - asked, normalize=False),
    "priced": lambda price: SparseConnectivity(penalty=price),
    "gradual": lambda asked: GradualMagnitude(asked),
    "magnitude": lambda asked: Magnitude(asked, structure="connection"),
    "magnitude-all": lambda asked: Magnitude(asked, structure="connection", scope="global"),
}


@dataclass(frozen=True)
class Setting:
    """What all runs of a results file that are compared have in common.

    Attributes:
        model: one of ``MODELS``.
        epochs: of training, all methods alike.
        every: only every so-manyth training image is used.
    """

    model: str
    epochs: int
    every: int


def lenet_300_100() -> nn.Module:
    """Three linear layers, 266,200 connections."""
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def lenet_5() -> nn.Module:
    """Two convolutions and two linear layers, 430,500 connections."""
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)]
    return nn.Sequential(*convolutions, *head)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
    "gru": lambda: RowReader(nn.GRU, 100),
}


class Experiment:
    """One setting: the data, and what is done with it."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.setting = setting
        self.mnist = read_mnist(folder, setting.every, HELD_OUT)

    def run(self, method: str, asked: float, seed: int) -> dict[str, Any]:
        """Trains from scratch, prunes on the way, judges."""
        with preserved_random_state(seed):
            model = MODELS[self.setting.model]()
        epochs = self.setting.epochs
        if method == "dense":
            fit(model, make_task(self.mnist, epochs, seed), name="dense")
            return {"accuracy": accuracy(model, self.mnist.test)}
        if method.startswith("magnitude"):
            fit(model, make_task(self.mnist, epochs - epochs // 2, seed), name="before pruning")
            epochs //= 2
        chosen = METHODS[method](asked)
        example = self.mnist.train[0][:2]
        compact = fxprune.compile(
            model, chosen, example_inputs=(example,), task=make_task(self.mnist, epochs, seed)
        )
        return {
            "accuracy": accuracy(compact.module, self.mnist.test),
            "removed": compact.report.sparsity,
            "parameters": compact.report.parameters_after,
            "policy": str(chosen),
        }


# Results ------------------------------------------------------------------------------------------


def planned(
    seeds: int, methods: Sequence[str], asked: Sequence[float], prices: Sequence[float]
) -> Iterator[Run]:
    """All runs, seed by seed."""
    for seed in range(seeds):
        yield {"seed": seed, "method": "dense", "asked": 0.0}
        for method in methods:
            for value in prices if method == "priced" else asked:
                yield {"seed": seed, "method": method, "asked": value}


def run_missing(experiment: Experiment, runs: Sequence[Run], path: Path) -> None:
    """Does the runs that the file does not have."""
    setting = asdict(experiment.setting)
    keys = ("setting", "seed", "method", "asked")
    done = [{k: r[k] for k in keys} for r in read_results(path)]
    waiting = [r for r in runs if {"setting": setting, **r} not in done]
    with track("runs", len(runs), done=len(runs) - len(waiting)) as tracker:
        for run in waiting:
            start = time.perf_counter()
            found = experiment.run(run["method"], run["asked"], run["seed"])
            seconds = round(time.perf_counter() - start, 1)
            add_result(path, {"setting": setting, **run, **found, "seconds": seconds})
            tracker.advance()


HEADS = "model|method|knob|removed|parameters|seeds|accuracy|change"


def result_table(runs: Sequence[Run]) -> str:
    """Mean and deviation over the seeds, a row for each method and knob, in Markdown.

    The knob is the sparsity asked for, or the price of a connection. "change" is the accuracy minus
    that of the dense model of the same seed, in points.
    """
    rows = []
    for name, method, asked in sorted({_row(r) for r in runs}, key=_place):
        of = [r for r in runs if _row(r) == (name, method, asked)]
        dense = {
            r["seed"]: r["accuracy"]
            for r in runs
            if r["method"] == "dense" and r["setting"] == of[0]["setting"]
        }
        compared = [r["accuracy"] - dense[r["seed"]] for r in of if r["seed"] in dense]
        pruned = method != "dense"
        rows.append(
            [
                name,
                method,
                "" if not pruned else f"{asked:g}" if method == "priced" else f"{asked:.1%}",
                f"{mean(r['removed'] for r in of):.2%}" if pruned else "",
                f"{mean(r['parameters'] for r in of):,.0f}" if pruned else "",
                str(len(of)),
                spread([r["accuracy"] for r in of], ".2f"),
                spread(compared, "+.2f") if pruned and compared else "",
            ]
        )
    return markdown(HEADS, rows)


def _row(run: Run) -> tuple[str, str, float]:
    return run["setting"]["model"], run["method"], run["asked"]


def _place(row: tuple[str, str, float]) -> tuple[int, bool, float, int]:
    """By model, then by sparsity, then by method; what is priced comes last."""
    name, method, asked = row
    order = ("dense", *METHODS)
    return list(MODELS).index(name), method == "priced", asked, order.index(method)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.table is not None:
        found = read_results(options.table)
        print(result_table(found))
        if options.picture is not None:
            draw_changes(options.picture, curves(found, lambda r: (r["method"], r["asked"])))
        return 0
    if options.quick:
        options.seeds, options.sparsity, options.price = 1, (0.9,), (0.01,)
        options.epochs, options.every = 4, 100
    setting = Setting(options.model, options.epochs, options.every)
    runs = list(planned(options.seeds, options.methods, options.sparsity, options.price))
    try:
        experiment = Experiment(options.data, setting)
    except FileNotFoundError as error:
        parser.error(str(error))
    run_missing(experiment, runs, options.out)
    print(result_table([r for r in read_results(options.out) if r["setting"] == asdict(setting)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = results_parser(
        "sparse_connectivity", __doc__, "folder with mnist/mnist_train.npz and mnist/mnist_test.npz"
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="lenet-300-100", help="[%(default)s]")
    add("--seeds", type=int, default=3, help="how many seeds, from 0 [%(default)s]")
    sparsity_help = "fractions of the connections to remove [0.9 0.95 0.97 0.98 0.99]"
    default = (0.9, 0.95, 0.97, 0.98, 0.99)
    add("--sparsity", type=float, nargs="+", default=default, help=sparsity_help)
    price_help = "prices of a connection, of `priced` [0.003 0.01 0.03]"
    add("--price", type=float, nargs="+", default=(0.003, 0.01, 0.03), help=price_help)
    picture_help = "with --table, draw accuracy and what is left into this file"
    add("--picture", type=Path, help=picture_help)
    methods_help = f"{', '.join(METHODS)} [all]"
    default_methods = tuple(METHODS)
    add("--methods", nargs="+", choices=METHODS, default=default_methods, help=methods_help)
    add("--epochs", type=int, default=16, help="of training, all methods alike [%(default)s]")
    add("--every", type=int, default=1, help="use every so-manyth image [%(default)s]")
    add("--quick", action="store_true", help="only see that it works: one seed, few images")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
