"""Prune a 2x200 LSTM language model stage by stage, next to baselines with the same budget.

    python -m examples.stage_wise_lm --data PATH [--words | --long] [--seeds 0 1 2] [--quick]
    python -m examples.stage_wise_lm --table stage_wise_lm.jsonl [--picture stage_wise.png]

Characters of tinyshakespeare, or with ``--words`` the words of the Penn Treebank. For each seed a
dense model is trained; then every method prunes it:

- joint: ratios of all connection classes together, by negatively correlated search;
- sequential: class by class, retraining between;
- mp: one ratio for all weights together, by bisection;
- lmp: one ratio for each layer, by negatively correlated search;
- random: as joint, with random search;
- cma: as joint, with CMA-ES (needs the package cma);
- gradual: the sparsity that joint reached, of every weight alike, grown while it trains; no search.

All have as many epochs of training to spend, and all that search as many evaluations. A search may
worsen the perplexity by ``tolerance``; a round whose retrained model is worse than dense by more
than ``recovery`` is undone, so all end about as good, and the question is how sparse. Only gradual
has the sparsity given, and the question is how good; ``--gradual`` asks it for others. Beside them
stand the dense model, and the same trained on for as many epochs ("dense, on").

Searches and epochs are judged on a fixed part of the validation text. The test text is read once,
for the result. Every run is one line of the results file, written when it is done; a script that
was stopped goes on behind the last one, and within a run where it was.

Source: Li et al., "Evolutionary stage-wise pruning", TNNLS 2022. What is reduced here is in
``Setting``; the authors have up to 100 rounds of 800 evaluations and 8 epochs, with SGD.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from examples.language_model import (
    CLIP,
    RATE,
    Corpus,
    LanguageModel,
    Reader,
    batches,
    falling,
    judge,
    optimizer,
    products,
    read_corpus,
)
from examples.result_lines import Run, add_result, by_setting, read_results, results_parser
from examples.stage_wise_table import CLASSES, draw, table
from fxprune.contract import Pass
from fxprune.passes import GradualMagnitude, StageWise
from fxprune.training import Task, fit, preserved_random_state

SEARCHES: Mapping[str, Mapping[str, Any]] = {
    "joint": {},
    "sequential": {"order": "sequential"},
    "mp": {"grouping": "one", "search": "bisection"},
    "lmp": {"grouping": "layer"},
    "random": {"search": "random"},
    "cma": {"search": "cma"},
}
METHODS = (*SEARCHES, "gradual")


@dataclass(frozen=True)
class Setting:
    """What all runs that are compared have in common.

    Attributes:
        text: "characters" or "words".
        width: of the embedding and of both layers.
        tokens: of the training text used, from its beginning; 0 for all.
        judged: tokens of the validation text that searches and epochs are judged on.
        batch: parts of a text that are read side by side.
        steps: tokens of each that are read at a time.
        epochs: of dense training.
        retrain: epochs of each round.
        rounds: of each method, over all stages; a multiple of the number of classes.
        population: candidates per generation.
        generations: of each round's search.
        tolerance: of a search, relative to the dense model's perplexity.
        recovery: of a retrained model, likewise.
        retries: rounds that may fail to recover before the next ends the run.
        falling: what is left of the rate at the end of each training, over whose second half it
            falls geometrically; 1 leaves it constant.
        spread: of the weights of embedding and decoder before training; None for torch's.
    """

    text: str = "characters"
    width: int = 200
    tokens: int = 300_000
    judged: int = 10_000
    batch: int = 32
    steps: int = 64
    epochs: int = 10
    retrain: int = 1
    rounds: int = 6
    population: int = 8
    generations: int = 10
    tolerance: float = 0.3
    recovery: float = 0.01
    retries: int = 2
    falling: float = 1.0
    spread: float | None = None


WORDS = Setting(
    text="words",
    tokens=0,
    batch=20,
    steps=35,
    epochs=6,
    rounds=3,
    generations=6,
    tolerance=1.0,
    recovery=0.1,
)
"""Few rounds, so each goes far; 10 % worse than dense is what the published point is."""
LONG = replace(WORDS, epochs=8, retrain=3, rounds=10, falling=0.05, spread=0.1)
"""More and better training, of the dense model as well as in rounds, from the published start."""
QUICK = Setting("characters", 16, 20_000, 2_000, 8, 25, 2, 1, 3, 4, 3)


def make_task(
    corpus: Corpus, setting: Setting, seed: int, epochs: int, folder: Path | None
) -> Task:
    """Training on the text, judged by perplexity on the fixed part of the validation text."""
    train = batches(corpus.train[: setting.tokens or None], setting.batch, setting.steps)
    judged = batches(corpus.validation[: setting.judged], setting.batch, setting.steps)
    steps = max(1, epochs * len(train))
    return Task(
        Reader(setting.width).loss,
        train,
        lambda model: judge(model, judged, setting.width)[0],
        goal="min",
        optimizer=partial(optimizer, setting.text, RATE[setting.text]),
        epochs=epochs,
        clip=CLIP[setting.text],
        scheduler=partial(falling, setting.falling, steps) if setting.falling < 1 else None,
        checkpoint=folder,
        seed=seed,
    )


@dataclass
class Spent:
    """What a run took in this process: epochs of training, and perplexities computed."""

    epochs: float = 0.0
    evaluations: int = 0

    def counted(self, task: Task) -> Task:
        """The task; from now on it counts here."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            self.epochs += 1 / (task.batches or 1)
            return task.loss(model, batch)

        def validate(model: nn.Module) -> float:
            self.evaluations += 1
            return task.validate(model)

        return replace(task, loss=loss, validate=validate)


def policy(method: str, setting: Setting) -> StageWise:
    """The pass of a method that searches; sequential stages share the rounds."""
    options = dict(SEARCHES[method])
    stages = len(CLASSES) if options.get("order") == "sequential" else 1
    return StageWise(
        setting.tolerance,
        rounds=setting.rounds // stages,
        population=setting.population,
        generations=setting.generations,
        relative=True,
        recovery=setting.recovery,
        retries=setting.retries,
        **options,
    )


class Experiment:
    """One seed: its dense model, and what is done to it.

    Args:
        corpus: the texts.
        setting: what is the same for all runs.
        seed: of weights, training and searches.
        folder: for checkpoints.
    """

    def __init__(self, corpus: Corpus, setting: Setting, seed: int, folder: Path) -> None:
        self.corpus, self.setting, self.seed, self.folder = corpus, setting, seed, folder

    @cached_property
    def dense(self) -> LanguageModel:
        """The trained dense model; training goes on where it was stopped."""
        with preserved_random_state(self.seed):
            model = LanguageModel(self.corpus.vocabulary, self.setting.width, self.setting.spread)
        fit(model, self.task(self.setting.epochs, "dense"), name="dense")
        return model.eval()

    def task(self, epochs: int, name: str) -> Task:
        """Training whose checkpoints go to a folder of that name."""
        return make_task(self.corpus, self.setting, self.seed, epochs, self.folder / name)

    def run_dense(self, epochs: int) -> Run:
        """The dense model, trained on for so many epochs, as a result."""
        model = copy.deepcopy(self.dense)
        fit(model, self.task(epochs, f"dense-{epochs}"), name="dense, trained on")
        return {
            "sparsity": 0.0,
            "by_class": {},
            "nonzeros": _nonzeros(model),
            **self.scores(model.eval()),
        }

    def run_search(self, method: str) -> Run:
        """Prune by a method that searches."""
        return self._prune(policy(method, self.setting), self.task(self.setting.retrain, method))

    def run_gradual(self, sparsity: float) -> Run:
        """Prune to a sparsity by gradual magnitude."""
        task = self.task(self._epochs, f"gradual-{sparsity:.4f}")
        return self._prune(GradualMagnitude(sparsity), task)

    def missing(self, methods: Sequence[str], targets: Sequence[float], out: Path) -> None:
        """Make the runs that the file lacks."""
        runs: dict[str, Callable[[], Run]] = {"dense": partial(self.run_dense, 0)}
        runs |= {m: partial(self.run_search, m) for m in SEARCHES if m in methods}
        if "gradual" in methods:
            runs["gradual"] = lambda: self.run_gradual(self._sparsity_of("joint", out))
        runs |= {f"gradual {s:.1%}": partial(self.run_gradual, s) for s in targets}
        runs["dense, on"] = partial(self.run_dense, self._epochs)
        for method, run in runs.items():
            if not any(r["method"] == method for r in _of(self.setting, [self.seed], out)):
                began = time.perf_counter()
                head = {"setting": asdict(self.setting), "seed": self.seed, "method": method}
                found = run()
                seconds = round(time.perf_counter() - began, 1)
                made = {"products": products("cpu"), "seconds": seconds}
                add_result(out, {**head, **found, **made})

    @property
    def _epochs(self) -> int:
        return self.setting.rounds * self.setting.retrain

    def _prune(self, chosen: Pass, task: Task) -> Run:
        states, spent = torch.zeros(2, 2, self.setting.width), Spent()
        tokens = self.corpus.train[:6].reshape(3, 2)
        compact = fxprune.compile(
            self.dense, chosen, example_inputs=(tokens, states, states), task=spent.counted(task)
        )
        report = compact.report
        return {
            "policy": str(chosen),
            "sparsity": report.sparsity,
            "by_class": {str(kind): count.removed for kind, count in report.by_class.items()},
            "nonzeros": _nonzeros(compact.module),
            "ends": [r.reason for r in report.refusals if r.node.startswith("stage-wise")],
            "spent": {"epochs": round(spent.epochs, 2), "evaluations": spent.evaluations},
            **self.scores(compact.module),
        }

    def scores(self, model: nn.Module) -> Run:
        """Perplexity and accuracy on the whole validation text and on the test text."""
        found: dict[str, float] = {}
        for name, text in (("validation", self.corpus.validation), ("test", self.corpus.test)):
            cut = batches(text, self.setting.batch, self.setting.steps)
            perplexity, accuracy = judge(model, cut, self.setting.width)
            found |= {f"{name}_perplexity": perplexity, f"{name}_accuracy": accuracy}
        return found

    def _sparsity_of(self, method: str, out: Path) -> float:
        known = _of(self.setting, [self.seed], out)
        return float(next(r["sparsity"] for r in known if r["method"] == method))


def _nonzeros(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def _of(setting: Setting, seeds: Sequence[int], out: Path) -> list[Run]:
    return [r for r in read_results(out) if r["setting"] == asdict(setting) and r["seed"] in seeds]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.table is not None:
        runs = read_results(options.table)
    else:
        setting = LONG if options.long else WORDS if options.words else Setting()
        if options.quick:
            setting = replace(QUICK, text=setting.text)
        given = {n: getattr(options, n) for n in ("rounds", "retrain", "recovery")}
        given = {n: v for n, v in given.items() if v is not None}
        setting = replace(setting, **given)
        if options.search_only and given:
            parser.error(f"--search-only: retrains nothing, so --{next(iter(given))} says nothing")
        if options.search_only:
            setting = replace(setting, rounds=1, retrain=0, recovery=setting.tolerance)
        try:
            corpus = read_corpus(options.data, setting.text)
        except FileNotFoundError as error:
            parser.error(str(error))
        if "gradual" in options.methods and "joint" not in options.methods:
            parser.error("--methods: gradual needs joint, whose sparsity it is given")
        if options.search_only and {"sequential", "gradual"} & {*options.methods}:
            parser.error("--search-only: sequential and gradual need retraining, see --methods")
        for seed in options.seeds:
            name = f"{setting.text}{'-long' * options.long}-{setting.width}-seed-{seed}"
            folder = options.out.with_suffix("") / name
            experiment = Experiment(corpus, setting, seed, folder)
            experiment.missing(options.methods, options.gradual, options.out)
        runs = _of(setting, options.seeds, options.out)
    print(by_setting(runs, table))
    if options.picture is not None:
        draw(runs, options.picture)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = results_parser("stage_wise_lm", __doc__, "folder with the texts")
    add = parser.add_argument
    add("--words", action="store_true", help="Penn Treebank, by words")
    add("--long", action="store_true", help="words, with more rounds and a rate that falls")
    add("--rounds", type=int, help="of pruning and retraining, at most")
    add("--retrain", type=int, help="epochs in each round")
    recovery_help = "how much worse than dense a retrained model may be, relative to its perplexity"
    add("--recovery", type=float, help=recovery_help)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    searched = [m for m in METHODS if m != "cma"]
    add("--methods", nargs="*", choices=METHODS, default=searched, help="[all but cma]")
    add("--gradual", type=float, nargs="+", default=[], help="more sparsities for gradual")
    only_help = "one search of each method (not sequential, not gradual) and no retraining"
    add("--search-only", action="store_true", help=only_help)
    add("--picture", type=Path, help="draw sparsity and perplexity into this file")
    add("--quick", action="store_true", help="a tiny model, to see that it works")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
