"""Select the neurons of a 2x512 LSTM language model, next to other ways to the same sizes.

    python -m examples.neuron_selection_lm --data PATH [--words] [--device cuda] [--quick]
        [--seeds 0 1 2] [--target 0.1] [--width 256] [--tokens 300000] [--epochs 6]
    python -m examples.neuron_selection_lm --table neuron_selection_lm.jsonl

Characters of tinyshakespeare, or with ``--words`` the words of the Penn Treebank and 2x1500. All
methods train for at most as many steps and, but for ``small``, from the same initial weights:

- dense: the whole model;
- l0: hard concrete gates on embedding channels and units, to a fraction of the dense
  multiply-accumulate operations, learned in most of the steps; then the gates become weights, the
  model shrinks, and the compact one trains on;
- lasso: the same with group lasso;
- magnitude: dense for a smaller part, then the smallest neurons go at once, as many of each group
  as l0 left out, and the compact model trains on;
- small: a dense model of the sizes that l0 arrived at, from scratch, with weights of its own.

The validation text chooses the epoch, and ends a training that has been no better for some. The
test text is read once, for the result. Latency is that of the ONNX file in onnxruntime on one CPU
thread, for one text of 35 tokens, in turns with the dense file. Every run is one line of the
results file, written when it is done; a script that was stopped goes on behind the last one.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

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
from examples.result_lines import (
    Run,
    add_result,
    by_setting,
    markdown,
    read_results,
    results_parser,
    spread,
)
from fxprune import latency
from fxprune.compact import Compact
from fxprune.contract import Effect, Facts, NeuronAnalysis, Pass, PassResult
from fxprune.masking.prunable import find_prunable
from fxprune.masking.scores import neuron_scores
from fxprune.passes import NeuronSelection
from fxprune.policy import protected
from fxprune.program import Program
from fxprune.training import Task, fit, preserved_random_state

CRITERIA: Mapping[str, Literal["l0", "group_lasso"]] = {"l0": "l0", "lasso": "group_lasso"}
METHODS = ("dense", "l0", "lasso", "magnitude", "small")


@dataclass(frozen=True)
class Setting:
    """What all runs that are compared have in common.

    Attributes:
        text: "characters" or "words".
        width: of the embedding and of both layers.
        tokens: of the training text used, from its beginning; 0 for all.
        batch: parts of a text that are read side by side.
        steps: tokens of each that are read at a time.
        epochs: of training, in all.
        selecting: the fraction of them in which gates are learned, before the model shrinks.
        cutting: the fraction of them before the smallest neurons go, for ``magnitude``.
        patience: epochs without progress after which a training ends.
        rate: of Adam for characters, of plain steps for words.
        falling: what is left of the rate in the end; it falls over the second half of the steps
            that the dense model or the compact one trains.
        target: fraction of the dense multiply-accumulate operations that is to be left.
        spread: of the weights of embedding and decoder before training; None for torch's.
    """

    text: str = "characters"
    width: int = 512
    tokens: int = 0
    batch: int = 32
    steps: int = 64
    epochs: int = 8
    selecting: float = 0.75
    cutting: float = 0.375
    patience: int = 3
    rate: float = RATE["characters"]
    target: float = 0.1
    falling: float = 0.05
    spread: float | None = None


WORDS = Setting("words", 1500, 0, 20, 35, 40, rate=RATE["words"], target=0.06, spread=0.1)
QUICK = Setting(
    "characters", 16, 20_000, 8, 25, 4, selecting=0.5, cutting=0.5, rate=1e-2, target=0.3
)


@dataclass(frozen=True)
class SmallestNeurons(Pass):
    """Cuts the neurons of least magnitude down to given numbers.

    Attributes:
        sizes: names of neuron groups and how many of each stay.
    """

    effect = Effect.LOSSY
    needs = (NeuronAnalysis,)
    keeps = frozenset({NeuronAnalysis})

    sizes: tuple[tuple[str, int], ...]

    def run(self, program: Program, facts: Facts) -> PassResult:
        """Adds to the masks of the program."""
        neurons = facts[NeuronAnalysis]
        found = find_prunable(program, neurons, protected(program, neurons, ()))
        scores = neuron_scores(found.weights, neurons.count, norm=2)
        groups = {g.name: g.neurons for g in neurons.groups}
        cut = [
            groups[name][scores[groups[name]].argsort(stable=True)[: len(groups[name]) - size]]
            for name, size in self.sizes
        ]
        masks = program.masks.cut_neurons(torch.cat(cut))
        return PassResult(replace(program, masks=masks), True)


class Experiment:
    """One seed: its initial model, and what is made of it.

    Args:
        corpus: the texts.
        setting: what is the same for all runs.
        seed: of weights, order and gates.
        folder: for checkpoints.
        device: where to train.
    """

    def __init__(
        self, corpus: Corpus, setting: Setting, seed: int, folder: Path, device: str
    ) -> None:
        self.corpus, self.setting, self.seed = corpus, setting, seed
        self.folder, self.device = folder, device

    def initial(self) -> LanguageModel:
        """The model before training."""
        with preserved_random_state(self.seed):
            return LanguageModel(self.corpus.vocabulary, self.setting.width, self.setting.spread)

    def task(self, name: str, epochs: float, *, last: bool = True) -> Task:
        """Training on the text, judged by perplexity on the validation text.

        The rate falls in the last training of a model.
        """
        setting = self.setting
        train = batches(self.corpus.train[: setting.tokens or None], setting.batch, setting.steps)
        steps = round(epochs * len(train))
        return Task(
            Reader(setting.width).loss,
            train,
            lambda model: self.judge(model, self.corpus.validation)[0],
            goal="min",
            optimizer=partial(optimizer, setting.text, setting.rate),
            scheduler=partial(falling, setting.falling, steps) if last else None,
            steps=steps,
            clip=CLIP[setting.text],
            patience=setting.patience,
            checkpoint=self.folder / name,
            seed=self.seed,
            device=self.device,
        )

    def judge(self, model: nn.Module, text: Tensor) -> tuple[float, float]:
        """Perplexity and accuracy, where the model is."""
        device = next(model.parameters()).device
        cut = batches(text, self.setting.batch, self.setting.steps)
        moved = [(x.to(device), y.to(device), first) for x, y, first in cut]
        return judge(model, moved, self.setting.width)

    def compile(self, model: nn.Module, policy: Sequence[Pass], task: Task | None) -> Compact:
        """Compiles on an example of one text, 35 tokens long."""
        states = torch.zeros(2, 1, self.setting.width)
        example = (self.corpus.train[:35].reshape(35, 1), states, states)
        return fxprune.compile(model, policy, example_inputs=example, task=task)

    def run(self, method: str, sizes: Mapping[str, int]) -> Run:
        """Train by one method.

        Args:
            method: see the module.
            sizes: what l0 left of each neuron group, for the methods that are given it.
        """
        setting = self.setting
        part = setting.cutting if method == "magnitude" else setting.selecting
        first, rest = setting.epochs * part, setting.epochs * (1 - part)
        if method == "dense":
            model = self.initial()
            fit(model, self.task(method, setting.epochs), name=method)
            return self.scores(self.compile(model, [], None))
        if method in CRITERIA:
            criterion = CRITERIA[method]
            # To the end of this part, since the compact model trains on.
            chosen = NeuronSelection(setting.target, criterion=criterion, ramp=0.9, end=1.0)
            task = self.task(f"{method}-gates", first, last=False)
            compact = self.compile(self.initial(), [chosen], task)
        else:
            model = self.initial()
            if method == "magnitude":
                fit(model, self.task("magnitude-dense", first, last=False), name=method)
            compact = self.compile(model, [SmallestNeurons(tuple(sizes.items()))], None)
            if method == "small":
                rest = setting.epochs
                with preserved_random_state(self.seed):
                    _initialize(compact.module, setting.spread)
        fit(compact.module, self.task(method, rest), name=method)
        return self.scores(compact)

    def scores(self, compact: Compact) -> Run:
        """How good, how large and how fast a model is."""
        found: dict[str, Any] = {}
        for name, text in (("validation", self.corpus.validation), ("test", self.corpus.test)):
            perplexity, accuracy = self.judge(compact.module.eval(), text)
            found |= {f"{name}_perplexity": perplexity, f"{name}_accuracy": accuracy}
        report = compact.report
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("dense.onnx", "compact.onnx")]
            for path, model in zip(paths, (self.dense_untrained, compact), strict=True):
                model.save_onnx(path)
            times = latency.compare(*paths, threads=1, sizes=self._sizes(paths[1]))
        return found | {
            "sizes": {g.name: g.neurons.after for g in report.groups if not g.frozen},
            "parameters": [report.parameters_before, report.parameters_after],
            "macs": [report.macs_before, report.macs_after],
            "milliseconds": [times.first.median, times.second.median],
            "speedup": times.speedup,
        }

    @cached_property
    def dense_untrained(self) -> Compact:
        """The whole model as a file is made of it; its weights do not matter for its speed."""
        return self.compile(self.initial(), [], None)

    def _sizes(self, path: Path) -> Mapping[str, int]:
        known = latency.measure(path, runs=1).sizes
        return {name: 35 if "time" in name or name == "tokens_dim_0" else 1 for name in known}


def _initialize(model: nn.Module, spread: float | None) -> None:
    """Weights as those of a :class:`LanguageModel` of these sizes begin."""
    for name, p in model.named_parameters():
        if spread is not None and not name.startswith("lstm"):
            nn.init.zeros_(p) if name == "decoder.bias" else nn.init.uniform_(p, -spread, spread)
        elif name.startswith("embedding"):
            nn.init.normal_(p)
        else:
            width = model.get_parameter("decoder.weight").shape[1]
            if name.startswith("lstm"):
                width = model.get_parameter(f"lstm.weight_hh_l{name[-1]}").shape[1]
            nn.init.uniform_(p, -(width**-0.5), width**-0.5)


def missing(experiment: Experiment, methods: Sequence[str], out: Path) -> None:
    """Make the runs that the file lacks."""
    setting, seed, device = experiment.setting, experiment.seed, experiment.device
    for method in METHODS:
        known = {r["method"]: r for r in _of(setting, [seed], out)}
        if method not in methods or method in known:
            continue
        sizes = known["l0"]["sizes"] if method in ("magnitude", "small") else {}
        head = {"setting": asdict(setting), "seed": seed, "method": method}
        began = time.perf_counter()
        found = experiment.run(method, sizes)
        seconds = round(time.perf_counter() - began, 1)
        made = {"device": device, "products": products(device), "seconds": seconds}
        add_result(out, {**head, **found, **made})


def table(runs: Sequence[Run]) -> str:
    """Results in Markdown: a row for each method, means over seeds."""
    rows = []
    for method in METHODS:
        of = [r for r in runs if r["method"] == method]
        if not of:
            continue

        def cell(key: Callable[[Run], float], form: str, of: list[Run] = of) -> str:
            return spread([key(r) for r in of], form)

        sizes = sorted({" + ".join(map(str, r["sizes"].values())) for r in of})
        rows.append(
            (
                method,
                str(len(of)),
                cell(lambda r: math.log(r["validation_perplexity"]), ".4f"),
                cell(lambda r: math.log(r["test_perplexity"]), ".4f"),
                cell(lambda r: r["test_perplexity"], ".3f"),
                cell(lambda r: 100 * r["test_accuracy"], ".2f"),
                "; ".join(sizes),
                cell(lambda r: r["parameters"][1], ",.0f"),
                cell(lambda r: 100 * r["macs"][1] / r["macs"][0], ".2f"),
                cell(lambda r: r["milliseconds"][1], ".3f"),
                cell(lambda r: r["speedup"], ".1f"),
            )
        )
    return markdown(
        "method|seeds|validation loss|test loss|test perplexity|test accuracy %|"
        "embedding + units|parameters|MACs left %|ms|times faster",
        rows,
    )


def _of(setting: Setting, seeds: Sequence[int], out: Path) -> list[Run]:
    return [r for r in read_results(out) if r["setting"] == asdict(setting) and r["seed"] in seeds]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.table is not None:
        print(by_setting(read_results(options.table), table))
        return 0
    setting = QUICK if options.quick else WORDS if options.words else Setting()
    setting = replace(setting, text="words" if options.words else "characters")
    given = {n: getattr(options, n) for n in ("width", "tokens", "epochs", "target")}
    setting = replace(setting, **{n: v for n, v in given.items() if v is not None})
    if {"magnitude", "small"} & {*options.methods} and "l0" not in options.methods:
        parser.error("--methods: magnitude and small need l0, whose sizes they are given")
    try:
        corpus = read_corpus(options.data, setting.text)
    except FileNotFoundError as error:
        parser.error(str(error))
    for seed in options.seeds:
        name = "-".join(map(str, asdict(setting).values())) + f"-seed-{seed}"
        folder = options.out.with_suffix("") / name
        experiment = Experiment(corpus, setting, seed, folder, options.device)
        missing(experiment, options.methods, options.out)
    print(table(_of(setting, options.seeds, options.out)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = results_parser("neuron_selection_lm", __doc__, "folder with the texts")
    add = parser.add_argument
    add("--words", action="store_true", help="Penn Treebank, by words")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="[all]")
    add("--target", type=float, help="fraction of the operations that is to be left")
    add("--width", type=int, help="of the model")
    add("--tokens", type=int, help="of the training text")
    add("--epochs", type=int, help="of each run")
    add("--device", default="cpu", help="[cpu]")
    add("--quick", action="store_true", help="a tiny model, to see that it works")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
