"""Dynamic pruning of small models on MNIST: every structure, with and without regrowth.

    python -m examples.dynamic_mnist --data PATH [--model lenet5|gru|lstm|resnet] [--seeds 0 1 2]
    python -m examples.dynamic_mnist --table dynamic_mnist.jsonl [--picture curve.png]

For each seed a dense model is trained, and then pruned while it trains on (``--from-scratch``:
pruned while it trains for the first time). Each structure is pruned twice: masks follow the dense
weights, so that what was removed can come back; and on the same schedule what is removed stays so
("no regrowth"). Beside them stands the dense model, trained for as many epochs in all.

- ``--plan structures``: every structure and three mixtures, at one sparsity.
- ``--plan sparsities``: connections, filters (hidden units, in a recurrent layer) and both, each at
  three sparsities.
- ``--plan targets``: 90 % of the connections and 50 % of the filters, to be had for 0.2 points; for
  longer training, see ``--epochs``.

The best epoch is chosen on validation images, among those after the masks became final; the test
images are read once, for the result. Every run is one line of the results file, written when it is
done; a script that was stopped goes on behind the last one.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import fxprune
from examples.mnist import MODELS, Mnist, accuracy, make_task, read_mnist
from examples.result_lines import Run, add_result, markdown, read_results, results_parser, spread
from examples.result_picture import curves, draw_changes
from fxprune.latency import measure
from fxprune.masking.structures import NEURON_STRUCTURES as NEURONS
from fxprune.masking.structures import STRUCTURES
from fxprune.passes import DynamicPruning
from fxprune.progress import track
from fxprune.training import fit, preserved_random_state

MIXTURES = ("connection+filter", "row+column", "kernel+neuron")
SWEEP = {
    "connection": (0.8, 0.9, 0.95),
    "filter": (0.3, 0.5, 0.7),
    "connection+filter": ((0.8, 0.3), (0.9, 0.5), (0.95, 0.7)),
}
TARGETS = (("connection", 0.9), ("filter", 0.5))


@dataclass(frozen=True)
class Setting:
    """What all runs that are compared have in common.

    Attributes:
        model: its name.
        every: only every so-manyth training image is used.
        dense: epochs of the dense training; 0 to prune from scratch.
        epochs: of the training with masks.
    """

    model: str
    every: int
    dense: int
    epochs: int


class Counts(logging.Handler):
    """Keeps what passes say about weights that came back."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take the counts of a structure."""
        if isinstance(record.args, tuple) and len(record.args) == 3:
            _, structure, regrowth = record.args
            self.found[str(structure)] = asdict(regrowth)  # type: ignore[call-overload]


class Experiment:
    """One seed: the data, the dense model, and what is done to it."""

    def __init__(self, mnist: Mnist, setting: Setting, seed: int, scratch: Path) -> None:
        self.mnist, self.setting, self.seed = mnist, setting, seed
        with preserved_random_state(seed):
            self.dense = MODELS[setting.model]()
        if setting.dense:
            # The checkpoint is where the dense weights are kept for the runs of another day.
            folder = scratch / "-".join(map(str, (*asdict(setting).values(), seed)))
            fit(self.dense, make_task(mnist, setting.dense, seed, folder), name="dense")

    def run(self, structure: str, sparsity: Any, regrow: bool) -> dict[str, Any]:
        """Prunes, or trains on without if the structure is "dense", and judges."""
        task = make_task(self.mnist, self.setting.epochs, self.seed)
        if structure == "dense":
            with preserved_random_state(self.seed):
                model = MODELS[self.setting.model]()
            model.load_state_dict(self.dense.state_dict())
            before = accuracy(self.dense, self.mnist.test)
            fit(model, task, name="dense, on")
            compact = self.compile(model, fxprune.Policy(()))
            return {"before": before} | self.judge(compact, self.seed == 0)
        given = tuple(sparsity) if isinstance(sparsity, list) else sparsity
        # Entries compete across all weights, neurons within their layer. Half is fine-tuning.
        scope = tuple("group" if s in NEURONS else "global" for s in structure.split("+"))
        chosen = DynamicPruning(given, structure, scope, end=0.5, regrow=regrow)
        counts, log = Counts(), logging.getLogger("fxprune")
        log.addHandler(counts)
        log.setLevel(logging.INFO)
        try:
            compact = self.compile(self.dense, chosen, task)
        finally:
            log.removeHandler(counts)
        timed = regrow and self.seed == 0  # without regrowth the sizes are the same, or nearly so
        return {"regrown": counts.found, "policy": str(chosen)} | self.judge(compact, timed)

    def compile(self, model: nn.Module, policy: Any, task: Any = None) -> fxprune.Compact:
        """Compiles for images of this size, of which any number can come."""
        return fxprune.compile(
            model,
            policy,
            example_inputs=self.mnist.test[0][:1],
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            task=task,
        )

    def judge(self, compact: fxprune.Compact, timed: bool) -> dict[str, Any]:
        """Test accuracy, sizes, and where wanted the latency at batch 1."""
        report = compact.report
        found = {
            "accuracy": accuracy(compact.module, self.mnist.test),
            "removed": report.sparsity,
            "parameters": report.parameters_after,
            "macs": report.macs_after,
        }
        if timed:
            found["latency"] = latency(compact)
        return found


def latency(compact: fxprune.Compact) -> float:
    """Milliseconds of one call in onnxruntime on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        compact.save_onnx(path)
        return measure(path, runs=300).median


# Results ------------------------------------------------------------------------------------------


def planned(plan: str, seeds: Sequence[int], sparsity: float, model: str) -> Iterator[Run]:
    """All runs, seed by seed, the dense one first."""
    for seed in seeds:
        yield {"seed": seed, "structure": "dense", "sparsity": 0.0, "regrow": True}
        cases: Sequence[tuple[str, Any]]
        if plan == "sparsities":
            cases = [(s, v) for s, values in SWEEP.items() for v in values]
        elif plan == "targets":
            cases = TARGETS
        else:
            depth = model == "resnet"  # the others have no residual branch
            cases = [(s, sparsity) for s in (*STRUCTURES, *MIXTURES) if depth or s != "depth"]
        for structure, value in cases:
            for regrow in (True, False):
                asked = _plain(value)
                yield {"seed": seed, "structure": structure, "sparsity": asked, "regrow": regrow}


def _plain(sparsity: Any) -> Any:
    """As a results file gives it back: several sparsities are a list there."""
    return list(sparsity) if isinstance(sparsity, tuple) else sparsity


def run_missing(mnist: Mnist, setting: Setting, runs: Sequence[Run], path: Path) -> None:
    """Does the runs that the file does not have."""
    keys = ("setting", "seed", "structure", "sparsity", "regrow")
    done = [{k: r[k] for k in keys} for r in read_results(path)]
    waiting = [r for r in runs if {"setting": asdict(setting), **r} not in done]
    experiment: Experiment | None = None
    with track("runs", len(runs), done=len(runs) - len(waiting)) as tracker:
        for run in waiting:
            start = time.perf_counter()
            if experiment is None or experiment.seed != run["seed"]:
                scratch = path.with_suffix(".dense")
                experiment = Experiment(mnist, setting, run["seed"], scratch)
            found = experiment.run(run["structure"], run["sparsity"], run["regrow"])
            seconds = round(time.perf_counter() - start, 1)
            add_result(path, {"setting": asdict(setting), **run, **found, "seconds": seconds})
            tracker.advance()


HEADS = (
    "structure|asked|regrowth|seeds|accuracy, %|change|connections removed|parameters|MACs|"
    "latency, ms|came back|of those in"
)


def result_table(runs: Sequence[Run]) -> str:
    """Mean and deviation over the seeds, a table for each setting, in Markdown.

    "change" is the accuracy minus that of the dense model of the same seed that trained as long, in
    points. "came back" is how often something removed came back, "of those in" how many of those
    that are in at the end were out before; in a mixture, one number for each structure.
    """
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(", ".join(f"{k} {v}" for k, v in run["setting"].items()), []).append(
            run
        )
    return "\n\n".join(f"{name}\n\n{_table(group)}" for name, group in settings.items())


def _table(runs: Sequence[Run]) -> str:
    dense = {r["seed"]: r["accuracy"] for r in runs if r["structure"] == "dense"}
    rows = []
    for key in dict.fromkeys(_key(r) for r in runs):
        of = [r for r in runs if _key(r) == key]
        structure, asked, regrow = key
        rows.append(
            [
                structure,
                "" if structure == "dense" else asked,
                "" if structure == "dense" else "yes" if regrow else "no",
                str(len(of)),
                spread([r["accuracy"] for r in of], ".2f"),
                spread([r["accuracy"] - dense[r["seed"]] for r in of], "+.2f"),
                f"{mean(r['removed'] for r in of):.1%}",
                f"{mean(r['parameters'] for r in of):,.0f}",
                f"{mean(r['macs'] for r in of):,.0f}",
                next((f"{r['latency']:.3f}" for r in of if "latency" in r), ""),
                _count(of, "returns") if regrow else "",
                _count(of, "survivors") if regrow else "",
            ]
        )
    return markdown(HEADS, rows)


def _key(run: Run) -> tuple[str, str, bool]:
    given = run["sparsity"] if isinstance(run["sparsity"], list) else [run["sparsity"]]
    return run["structure"], " / ".join(f"{s:.0%}" for s in given), run["regrow"]


def _curve_key(run: Run) -> tuple[str, str] | None:
    """Structure, told apart by regrowth, and sparsity, of the runs of the plan "sparsities"."""
    structure, asked, regrow = _key(run)
    swept = [_plain(value) for value in SWEEP.get(structure, ())]
    if structure != "dense" and run["sparsity"] not in swept:
        return None
    return structure if regrow else f"{structure}, no regrowth", asked


def _count(runs: Sequence[Run], what: str) -> str:
    structures = runs[0].get("regrown", {})
    return " / ".join(f"{mean(r['regrown'][s][what] for r in runs):,.0f}" for s in structures)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.table is not None:
        found = read_results(options.table)
        print(result_table(found))
        if options.picture is not None:
            draw_changes(options.picture, curves(found, _curve_key))
        return 0
    if options.quick:
        options.seeds, options.every, options.dense, options.epochs = [0], 200, 1, 4
    dense = 0 if options.from_scratch else options.dense
    setting = Setting(options.model, options.every, dense, options.epochs)
    try:
        mnist = read_mnist(options.data, options.every)
    except FileNotFoundError as error:
        parser.error(str(error))
    runs = list(planned(options.plan, options.seeds, options.sparsity, options.model))
    run_missing(mnist, setting, runs, options.out)
    print(result_table([r for r in read_results(options.out) if r["setting"] == asdict(setting)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = results_parser("dynamic_mnist", __doc__, "folder with mnist/")
    add = parser.add_argument
    add("--model", choices=MODELS, default="lenet5", help="which model [%(default)s]")
    plans = ("structures", "sparsities", "targets")
    add("--plan", choices=plans, default="sparsities", help="what to run [%(default)s]")
    sparsity_help = "of all structures in the plan of that name [%(default)s]"
    add("--sparsity", type=float, default=0.5, help=sparsity_help)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds [0 1 2]")
    every_help = "use every so-manyth training image, 1 for all [%(default)s]"
    add("--every", type=int, default=2, help=every_help)
    add("--dense", type=int, default=5, help="epochs to train the dense model [%(default)s]")
    add("--epochs", type=int, default=6, help="epochs with masks [%(default)s]")
    add("--from-scratch", action="store_true", help="prune while it trains for the first time")
    picture_help = "with --table, draw accuracy and what is left into this file"
    add("--picture", type=Path, help=picture_help)
    quick_help = "only see that it works: one seed, every 200th image, 1 and 4 epochs"
    add("--quick", action="store_true", help=quick_help)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
