"""Prune a GRU forecaster in one shot: by weights against their spread, by gradients, by chance.

    python -m examples.sensitivity_gru --data PATH [--series lan|los_loop|etth1]
    python -m examples.sensitivity_gru --table sensitivity_gru.jsonl

For each seed a dense GRU is trained. Then, for each method and sparsity, connections are masked,
the error on the test windows is taken, the rest is fine-tuned with a fresh optimizer, and the error
is taken again. "std", "magnitude" and "random" take the same share of each matrix, or nearly;
"gradient" and "magnitude-global" let all connections compete. Beside them stand

- the dense model, and the same model trained on for as many epochs as fine-tuning takes (without
  that control, more training would pass for the merit of pruning);
- a linear regression on the last 10 values, "all stays as it is", and the mean of the training.

Every run is one line of the results file, written when the run is done; a script that was stopped
goes on behind the last one. Weights are chosen on validation windows, never on the test windows.

Source of model, data and training: Tang et al., "SCGRU", Neurocomputing 2022. It differs in that
nn.GRU has weights of its own for each gate, and in what `--every`, `--epochs` and `--fine-tune`
reduce: the paper trains and fine-tunes 5 epochs on every window.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from examples.result_lines import Run, add_result, markdown, read_results, results_parser, spread
from examples.time_series import (
    BATCH,
    READERS,
    Series,
    Windows,
    errors,
    linear_forecast,
    persistence,
    training_mean,
)
from fxprune.contract import Context, Facts, Pass
from fxprune.passes import Magnitude, RandomPruning, Sensitivity
from fxprune.pipeline import run_passes
from fxprune.progress import track
from fxprune.training import fit, preserved_random_state

SPARSITIES = (0.95, 0.98, 0.99, 0.993)
METHODS = ("std", "gradient", "magnitude", "magnitude-global", "random")
UNFLOORED = "gradient-unfloored"  # rows may go empty, as in the original SNIP
FLOORS = {"mean": training_mean, "persistence": persistence, "linear": linear_forecast}
HIDDEN = {"lan": 350, "los_loop": 100, "etth1": 100}
GRADIENT_BATCHES = 32


@dataclass(frozen=True)
class Setting:
    """What all runs of a results file that are compared have in common.

    Attributes:
        series: name of the data.
        hidden: units of the GRU.
        every: only every so-manyth training window is used.
        epochs: to train the dense model.
        fine_tune: epochs after pruning, and of the dense control.
    """

    series: str
    hidden: int
    every: int
    epochs: int
    fine_tune: int


class Forecaster(nn.Module):
    """A GRU, and a linear layer on its last output."""

    def __init__(self, channels: int, hidden: int, targets: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, hidden, batch_first=True)
        self.out = nn.Linear(hidden, targets)

    def forward(self, x: Tensor) -> Tensor:
        """Maps windows [batch, lags, channels] to forecasts [batch, targets]."""
        outputs, _ = self.gru(x)
        return self.out(outputs[:, -1])  # type: ignore[no-any-return]


class Experiment:
    """One seed: the data, the dense model, and what is done to it."""

    def __init__(self, series: Series, setting: Setting, seed: int, scratch: Path) -> None:
        self.series, self.setting, self.seed = series, setting, seed
        x, y = series.train
        with preserved_random_state(seed):
            self.dense = Forecaster(x.shape[2], setting.hidden, y.shape[1])
        # The checkpoint is where the dense weights are kept for the runs of another day.
        name = "-".join(map(str, (*asdict(setting).values(), seed)))
        fit(self.dense, self.task(setting.epochs, scratch / name), name=f"dense, seed {seed}")

    def task(self, epochs: int, checkpoint: Path | None = None) -> fxprune.Task:
        """Adam, the error of the batch as the loss, the best epoch by validation windows."""
        x, y = (part[:: self.setting.every] for part in self.series.train)
        held_out = self.series.validation
        return fxprune.Task(
            loss=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]).sqrt(),
            train=DataLoader(TensorDataset(x, y), BATCH, shuffle=True),
            validate=lambda model: errors(forecast(model, held_out), held_out)[0],
            goal="min",
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=9e-5),
            epochs=epochs,
            checkpoint=checkpoint,
            seed=self.seed,
        )

    def judge(self, model: nn.Module) -> list[float]:
        """Both test errors, in the unit of the data."""
        return _errors(forecast(model, self.series.test), self.series)

    def run(self, method: str, sparsity: float) -> dict[str, Any]:
        """The result of a method, of which "dense" is one."""
        return self.run_dense() if method == "dense" else self.run_pruned(method, sparsity)

    def run_dense(self) -> dict[str, Any]:
        """Judges the dense model, and the same trained on as long as pruned ones are."""
        control = copy.deepcopy(self.dense)
        fit(control, self.task(self.setting.fine_tune), name="dense control")
        return {"before": self.judge(self.dense), "after": self.judge(control), "removed": 0.0}

    def run_pruned(self, method: str, sparsity: float) -> dict[str, Any]:
        """Prunes, judges, fine-tunes, judges."""
        example = self.series.train[0][:2]
        chosen = self.choose(method, sparsity)

        def pruned(epochs: int) -> fxprune.Compact:
            task = self.task(epochs)
            return fxprune.compile(self.dense, chosen, example_inputs=example, task=task)

        untuned, tuned = pruned(0), pruned(self.setting.fine_tune)
        counts = tuned.report.by_class
        return {
            "before": self.judge(untuned.module),
            "after": self.judge(tuned.module),
            "removed": tuned.report.sparsity,
            "left": {str(kind): count.after for kind, count in counts.items()},
            "parameters": tuned.report.parameters_after,
            "policy": str(chosen),
        }

    def choose(self, method: str, sparsity: float) -> Pass:
        """The pass that removes so many connections."""
        if method == "std":
            return self.threshold_pass(sparsity)
        if method in ("gradient", UNFLOORED):
            return Sensitivity(
                "gradient",
                sparsity=sparsity,
                scope="global",
                batches=GRADIENT_BATCHES,
                row_floor=method == "gradient",
            )
        if method == "magnitude":
            return Magnitude(sparsity, structure="connection")
        if method == "magnitude-global":
            return Magnitude(sparsity, structure="connection", scope="global")
        return RandomPruning(sparsity, structure="connection", seed=self.seed)

    def threshold_pass(self, sparsity: float) -> Sensitivity:
        """The threshold that removes as much, by bisection; the floor is half of what may stay."""
        program = fxprune.trace(self.dense, self.series.train[0][:2])
        facts = Facts(program, Context())
        total = sum(p.numel() for p in self.dense.parameters() if p.dim() > 1)
        floor = (1 - sparsity) / 2
        low, high = 0.0, 64.0
        for _ in range(24):
            middle = (low + high) / 2
            attempt = Sensitivity(threshold=middle, floor=floor)
            masks = run_passes(program, [attempt], facts=facts).program.masks.connections
            gone = sum(int((~m).sum()) for m in masks.values())
            low, high = (middle, high) if gone < sparsity * total else (low, middle)
        return Sensitivity(threshold=high, floor=floor)


@torch.no_grad()
def forecast(model: nn.Module, windows: Windows) -> Tensor:
    """Forecasts for all windows, in eval mode, a few at a time."""
    model.eval()
    return torch.cat([model(part) for part in windows[0].split(256)])


def _errors(predicted: Tensor, series: Series) -> list[float]:
    return [error * series.unit for error in errors(predicted, series.test)]


# Results ------------------------------------------------------------------------------------------


def planned(seeds: int, methods: Sequence[str], sparsities: Sequence[float]) -> Iterator[Run]:
    """All runs: the simple forecasts, which have no seed, and the rest seed by seed."""
    yield from ({"seed": 0, "method": m, "sparsity": 0.0} for m in FLOORS)
    for seed in range(seeds):
        yield {"seed": seed, "method": "dense", "sparsity": 0.0}
        for sparsity in sparsities:
            yield from ({"seed": seed, "method": m, "sparsity": sparsity} for m in methods)


def run_missing(series: Series, setting: Setting, runs: Sequence[Run], path: Path) -> None:
    """Does the runs that the file does not have."""
    done = [
        {k: r[k] for k in ("setting", "seed", "method", "sparsity")} for r in read_results(path)
    ]
    waiting = [r for r in runs if {"setting": asdict(setting), **r} not in done]
    experiment: Experiment | None = None
    with track("runs", len(runs), done=len(runs) - len(waiting)) as tracker:
        for run in waiting:
            start = time.perf_counter()
            if run["method"] in FLOORS:
                found = {"after": _errors(FLOORS[run["method"]](series), series)}
            else:
                if experiment is None or experiment.seed != run["seed"]:
                    scratch = path.with_suffix(".dense")
                    experiment = Experiment(series, setting, run["seed"], scratch)
                found = experiment.run(run["method"], run["sparsity"])
            seconds = round(time.perf_counter() - start, 1)
            add_result(path, {"setting": asdict(setting), **run, **found, "seconds": seconds})
            tracker.advance()


HEADS = "method|asked|removed|parameters|seeds|before|after|change|after, batches"


def result_table(runs: Sequence[Run]) -> str:
    """Mean and deviation over the seeds, a row for each method and sparsity, in Markdown.

    Before and after are the test errors around fine-tuning, or around as much more training of the
    dense model. "change" is the error afterwards minus that of the dense control of the same seed;
    "batches" the mean of the errors over batches of 32, as the paper reports.
    """
    control = {r["seed"]: r["after"][0] for r in runs if r["method"] == "dense"}
    rows = []
    for method, sparsity in sorted({_row(r) for r in runs}, key=lambda row: _place(*row)):
        of = [r for r in runs if _row(r) == (method, sparsity)]
        floor = method in FLOORS
        rows.append(
            [
                method,
                "" if floor else f"{sparsity:.1%}",
                "" if floor else f"{mean(r['removed'] for r in of):.2%}",
                f"{mean(r['parameters'] for r in of):,.0f}" if "parameters" in of[0] else "",
                "" if floor else str(len(of)),
                "" if floor else spread([r["before"][0] for r in of], ".4f"),
                spread([r["after"][0] for r in of], ".4f"),
                "" if floor else spread([r["after"][0] - control[r["seed"]] for r in of], "+.4f"),
                spread([r["after"][1] for r in of], ".4f"),
            ]
        )
    return markdown(HEADS, rows)


def _row(run: Run) -> tuple[str, float]:
    return run["method"], run["sparsity"]


def _place(method: str, sparsity: float) -> tuple[float, int]:
    """Simple forecasts first, then by sparsity, then by method."""
    order = (*FLOORS, "dense", *METHODS, UNFLOORED)
    return sparsity, order.index(method)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.table is not None:
        print(result_table(read_results(options.table)))
        return 0
    if options.quick:
        options.seeds, options.sparsity, options.hidden = 1, (0.95,), 16
        options.every, options.epochs, options.fine_tune = 40, 1, 1
    hidden = options.hidden or HIDDEN[options.series]
    setting = Setting(options.series, hidden, options.every, options.epochs, options.fine_tune)
    runs = list(planned(options.seeds, options.methods, options.sparsity))
    try:
        series = READERS[options.series](options.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    run_missing(series, setting, runs, options.out)
    print(result_table([r for r in read_results(options.out) if r["setting"] == asdict(setting)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = results_parser(
        "sensitivity_gru", __doc__, "folder with scgru_lan/, los_loop/ and etth1/"
    )
    add = parser.add_argument
    add("--series", choices=READERS, default="lan", help="which data [%(default)s]")
    add("--seeds", type=int, default=3, help="how many seeds, from 0 [%(default)s]")
    sparsity_help = "fractions of the connections to remove [0.95 0.98 0.99 0.993]"
    add("--sparsity", type=float, nargs="+", default=SPARSITIES, help=sparsity_help)
    choices = (*METHODS, UNFLOORED)
    methods_help = f"how connections are chosen: {', '.join(choices)} [all but the last]"
    add("--methods", nargs="+", choices=choices, default=METHODS, metavar="M", help=methods_help)
    add("--hidden", type=int, help="units of the GRU [350 for lan, else 100]")
    every_help = "use every so-manyth training window, 1 for all [%(default)s]"
    add("--every", type=int, default=2, help=every_help)
    add("--epochs", type=int, default=4, help="to train the dense model [%(default)s]")
    add("--fine-tune", type=int, default=2, help="epochs after pruning [%(default)s]")
    quick_help = "only see that it works: one seed, 95%%, 16 units, every 40th window, 1 epoch each"
    add("--quick", action="store_true", help=quick_help)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
