"""Prune a 2x200 LSTM language model stage by stage, next to baselines with the same budget.

    python -m examples.stage_wise_lm --data PATH [--words] [--seeds 0 1 2] [--quick]

Characters of tinyshakespeare, or with ``--words`` the words of the Penn Treebank. For each seed a
dense model is trained; then every method prunes it:

- joint: ratios of all connection classes together, by negatively correlated search;
- sequential: class by class, retraining between;
- mp: one ratio for all weights, by bisection;
- lmp: one ratio for each layer;
- random: as joint, with random search;
- cma: as joint, with CMA-ES (needs the package cma).

All get as many rounds of retraining, as many epochs in each, and as many evaluations (bisection
stops when it knows). A search may worsen the perplexity by ``tolerance``; a round whose retrained
model is worse than dense by more than ``recovery`` ends it, so all end about as good, and the
question is how sparse. Searches and epochs are judged on a fixed part of the validation text. The
test text is read once, for the result.

Every run is one line of the results file, written when it is done; a script that was stopped goes
on behind the last one, and within a run where it was.

Source: Li et al., "Evolutionary stage-wise pruning", TNNLS 2022. Reduced here, by default: 5
rounds of at most 100, 160 evaluations for 800, 2 epochs of retraining for 8; Adam for SGD.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import fxprune
from fxprune.passes import StageWise
from fxprune.training import Task, fit, preserved_random_state

Run = dict[str, Any]
Batch = tuple[Tensor, Tensor, bool]
"""Tokens and those that follow them, [time, batch], and whether the text begins here."""

CLASSES = ("feedforward", "input", "recurrent")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "joint": {},
    "sequential": {"order": "sequential"},
    "mp": {"grouping": "one", "search": "bisection"},
    "lmp": {"grouping": "layer"},
    "random": {"search": "random"},
    "cma": {"search": "cma"},
}


@dataclass(frozen=True)
class Setting:
    """What all runs that are compared have in common.

    Attributes:
        text: "characters" or "words".
        width: of the embedding and of both layers.
        tokens: of the training text used; 0 for all.
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
    """

    text: str = "characters"
    width: int = 200
    tokens: int = 0
    judged: int = 20_000
    batch: int = 64
    steps: int = 64
    epochs: int = 8
    retrain: int = 2
    rounds: int = 3
    population: int = 8
    generations: int = 20
    tolerance: float = 0.1
    recovery: float = 0.01


WORDS = Setting(text="words", batch=20, steps=35, epochs=6, retrain=1)
QUICK = Setting("characters", 16, 20_000, 2_000, 8, 25, 2, 1, 3, 4, 3)


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, decoder.

    Args:
        tokens: size of the vocabulary.
        width: of the embedding and of both layers.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, num_layers=2)
        self.decoder = nn.Linear(width, tokens)

    def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score what follows each token.

        Args:
            tokens: [time, batch].
            h: hidden states before the first one, [2, batch, width].
            c: cell states, likewise.

        Returns:
            Logits [time, batch, vocabulary] and the states after the last token.
        """
        y, (h, c) = self.lstm(self.embedding(tokens), (h, c))
        return self.decoder(y), h, c


@dataclass(frozen=True)
class Corpus:
    """A text in token numbers, each part [length], and how many tokens there are."""

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: int


def read_corpus(data: Path, text: str) -> Corpus:
    """Read a text; characters are split 85 : 5 : 10.

    Raises:
        FileNotFoundError: with the files that ``--data`` must hold.
    """
    if text == "words":
        parts = [
            _read(data / f"ptb/ptb.{part}.txt").replace("\n", " <eos> ").split()
            for part in ("train", "valid", "test")
        ]
    else:
        whole = _read(data / "tinyshakespeare/input.txt")
        first, second = len(whole) * 85 // 100, len(whole) * 90 // 100
        parts = [list(whole[:first]), list(whole[first:second]), list(whole[second:])]
    numbers = {token: i for i, token in enumerate(sorted(set().union(*parts)))}
    train, validation, test = (torch.tensor([numbers[t] for t in part]) for part in parts)
    return Corpus(train, validation, test, len(numbers))


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --data must name a folder that holds tinyshakespeare/input.txt, "
            "or for --words ptb/ptb.train.txt, ptb.valid.txt and ptb.test.txt"
        )
    return path.read_text(encoding="utf-8")


def batches(text: Tensor, batch: int, steps: int) -> list[Batch]:
    """Cut a text into ``batch`` parts that are read side by side, ``steps`` tokens at a time."""
    length = (len(text) - 1) // batch
    tokens = text[: length * batch].reshape(batch, length).t().contiguous()
    targets = text[1 : length * batch + 1].reshape(batch, length).t().contiguous()
    return [
        (tokens[i : i + steps], targets[i : i + steps], i == 0) for i in range(0, length, steps)
    ]


class Reader:
    """Reads batches one after another and carries the states from one to the next.

    ``width`` is that of the model's layers.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._states: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [tokens, vocabulary] and what they should name, [tokens]."""
        tokens, targets, first = batch
        if first or self._states is None:
            zeros = torch.zeros(2, tokens.shape[1], self._width, device=tokens.device)
            self._states = zeros, zeros
        logits, h, c = model(tokens, *self._states)
        self._states = h.detach(), c.detach()
        return logits.flatten(0, 1), targets.flatten()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy per token of one batch."""
        return functional.cross_entropy(*self(model, batch))


@torch.no_grad()
def judge(model: nn.Module, text: Sequence[Batch], width: int) -> tuple[float, float]:
    """Perplexity, and how many tokens are named first, over a text."""
    read, loss, right, count = Reader(width), 0.0, 0, 0
    for batch in text:
        logits, targets = read(model, batch)
        loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        right += int((logits.argmax(1) == targets).sum())
        count += len(targets)
    return math.exp(min(loss / count, 700.0)), right / count


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Adam with a learning rate of 2e-3."""
    return torch.optim.Adam(parameters, lr=2e-3)


def make_task(corpus: Corpus, setting: Setting, seed: int, epochs: int, folder: Path) -> Task:
    """Training on the text, judged by perplexity on the fixed part of the validation text."""
    train = corpus.train[: setting.tokens or None]
    judged = batches(corpus.validation[: setting.judged], setting.batch, setting.steps)
    return Task(
        Reader(setting.width).loss,
        batches(train, setting.batch, setting.steps),
        lambda model: judge(model, judged, setting.width)[0],
        goal="min",
        optimizer=adam,
        epochs=epochs,
        clip=1.0,
        checkpoint=folder,
        seed=seed,
    )


def dense_model(corpus: Corpus, setting: Setting, seed: int, folder: Path) -> LanguageModel:
    """The trained dense model of a seed; training goes on where it was stopped."""
    with preserved_random_state(seed):
        model = LanguageModel(corpus.vocabulary, setting.width)
    fit(model, make_task(corpus, setting, seed, setting.epochs, folder), name="dense")
    return model.eval()


def policy(method: str, setting: Setting) -> StageWise:
    """The pass of a method; sequential stages share the rounds."""
    options = dict(METHODS[method])
    stages = len(CLASSES) if options.get("order") == "sequential" else 1
    return StageWise(
        setting.tolerance,
        rounds=setting.rounds // stages,
        population=setting.population,
        generations=setting.generations,
        relative=True,
        recovery=setting.recovery,
        **options,
    )


def prune(
    dense: LanguageModel, corpus: Corpus, setting: Setting, seed: int, method: str, folder: Path
) -> Run:
    """One run: prune the dense model by a method and judge the result on all texts."""
    began = time.perf_counter()
    states = torch.zeros(2, 2, setting.width)
    compact = fxprune.compile(
        dense,
        policy(method, setting),
        example_inputs=(corpus.train[:6].reshape(3, 2), states, states),
        task=make_task(corpus, setting, seed, setting.retrain, folder / method),
    )
    report = compact.report
    run: Run = {
        "setting": asdict(setting),
        "seed": seed,
        "method": method,
        "sparsity": report.sparsity,
        "by_class": {str(kind): count.removed for kind, count in report.by_class.items()},
        "nonzeros": sum(int(p.count_nonzero()) for p in compact.module.parameters()),
        "ends": [r.reason for r in report.refusals if r.node.startswith("stage-wise")],
    }
    run |= scores(compact.module, corpus, setting)
    return run | {"seconds": round(time.perf_counter() - began, 1)}


def scores(model: nn.Module, corpus: Corpus, setting: Setting) -> Run:
    """Perplexity and accuracy on the validation text and on the test text."""
    found: Run = {}
    for name, text in (("validation", corpus.validation), ("test", corpus.test)):
        cut = batches(text, setting.batch, setting.steps)
        perplexity, accuracy = judge(model, cut, setting.width)
        found |= {f"{name}_perplexity": perplexity, f"{name}_accuracy": accuracy}
    return found


# Results ---------------------------------------------------------------------------------------


def read_results(path: Path) -> list[Run]:
    """The runs of a results file; a line that was being written when the script died is none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def add_result(path: Path, run: Run) -> None:
    """Add a run to the file, which holds either all of it or nothing."""
    lines = [json.dumps(known) for known in [*read_results(path), run]]
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)


def show(runs: Sequence[Run]) -> Table:
    """Mean and spread over the seeds, a row for each method."""
    table = Table(title=f"{runs[0]['setting']['text']}, test text, mean ± standard deviation")
    for head in ("method", "seeds", "perplexity", "accuracy", "sparsity", *CLASSES, "non-zeros"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for method in ("dense", *METHODS):
        of = [run for run in runs if run["method"] == method]
        if of:
            shares = [[run["by_class"].get(kind, 0.0) for run in of] for kind in CLASSES]
            table.add_row(
                method,
                str(len(of)),
                spread([run["test_perplexity"] for run in of], ".3f"),
                spread([run["test_accuracy"] for run in of], ".2%"),
                spread([run["sparsity"] for run in of], ".2%"),
                *(spread(share, ".2%") for share in shares),
                spread([run["nonzeros"] for run in of], ",.0f"),
            )
    return table


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the standard deviation where there are several."""
    text = format(mean(values), form)
    return f"{text} ± {format(stdev(values), form)}" if len(values) > 1 else text


def run_all(
    corpus: Corpus, setting: Setting, seeds: Sequence[int], methods: Sequence[str], out: Path
) -> list[Run]:
    """Make the runs that the file lacks; returns all that belong to the setting."""
    for seed in seeds:
        folder = out.with_suffix("") / f"{setting.text}-{setting.width}-seed-{seed}"
        known = {r["method"] for r in _of(setting, [seed], read_results(out))}
        if known >= {"dense", *methods}:
            continue
        dense = dense_model(corpus, setting, seed, folder)
        if "dense" not in known:
            nonzeros = sum(int(p.count_nonzero()) for p in dense.parameters())
            run = {"setting": asdict(setting), "seed": seed, "method": "dense", "sparsity": 0.0}
            run |= {"by_class": {}, "nonzeros": nonzeros, **scores(dense, corpus, setting)}
            add_result(out, run)
        for method in methods:
            if method not in known:
                add_result(out, prune(dense, corpus, setting, seed, method, folder))
    return _of(setting, seeds, read_results(out))


def _of(setting: Setting, seeds: Sequence[int], runs: Sequence[Run]) -> list[Run]:
    return [r for r in runs if r["setting"] == asdict(setting) and r["seed"] in seeds]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--words", action="store_true", help="Penn Treebank, by words")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "cma"]
    )
    parser.add_argument("--out", type=Path, default=Path("stage_wise_lm.jsonl"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    options = parser.parse_args(arguments)
    setting = WORDS if options.words else Setting()
    if options.quick:
        setting = replace(QUICK, text=setting.text)
    try:
        corpus = read_corpus(options.data, setting.text)
    except FileNotFoundError as error:
        parser.error(str(error))
    Console().print(show(run_all(corpus, setting, options.seeds, options.methods, options.out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
