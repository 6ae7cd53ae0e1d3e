"""Prune g2p_en and pronounce words with the ONNX files of its two smaller halves.

    python -m examples.g2p_en_pruned --data PATH --epochs 1 --plot g2p_en.png

The model is compiled as one encoder-decoder: its two GRUs lose the same units, since one hands its
state to the other. The smaller weights keep their names, so they load into the plain model at
its new sizes; its halves are then written as an encoder and a decoder step, which decode greedily
in onnxruntime, one phone per call, the state between calls as small as the GRUs.

With ``--epochs`` every pruned model is also trained, on words that the published figures do not
count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import fxprune
from examples.curves import (
    Point,
    cost_curves,
    curve_options,
    draw_curve,
    make_table,
    open_session,
    print_curve,
    size_table,
)
from examples.g2p_en import (
    DATA_HELP,
    STOP,
    DecoderStep,
    DecodeStep,
    Encode,
    Encoder,
    Entry,
    ErrorRates,
    Seq2Seq,
    decode,
    evaluate,
    from_state,
    load_model,
    read_dictionary,
    split_dictionary,
    step_through,
    teacher_inputs,
)
from fxprune.latency import compare
from fxprune.passes import Magnitude

RUNS = 500  # timed calls of each file
EXAMPLE, HELD_OUT, LEARNT, BATCH = 8, 1_000, 8_000, 64  # words

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # inputs of Seq2Seq, and the phones that follow


class Files(NamedTuple):
    """The ONNX files of one pruned model."""

    whole: Path
    encoder: Path
    step: Path


def prune(
    model: Seq2Seq, example: Sequence[Entry], sparsity: float, task: fxprune.Task | None = None
) -> fxprune.Compact:
    """Remove a fraction of the neurons; a task also trains the weights that stay."""
    return fxprune.compile(
        model,
        Magnitude(sparsity=sparsity, structure="neuron"),
        example_inputs=teacher_inputs(example),
        task=task,
        progress=False,
    )


def spelling_task(words: Sequence[Entry], epochs: int) -> fxprune.Task:
    """Learn to say the right next phone, judged on words apart from those learnt from."""
    judged, learnt = choose_words(words, HELD_OUT, LEARNT)
    held_out, train = _batches(judged), _batches(learnt)
    random.Random(2).shuffle(train)

    def loss(pruned: nn.Module, batch: Batch) -> Tensor:
        *inputs, following = batch
        logits = pruned(*inputs)
        return F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=0)

    def validate(pruned: nn.Module) -> float:
        return sum(loss(pruned, batch).item() for batch in held_out) / len(held_out)

    return fxprune.Task(loss, train, validate, goal="min", epochs=epochs, clip=1.0)


def choose_words(
    words: Sequence[Entry], held_out: int, learnt: int
) -> tuple[list[Entry], list[Entry]]:
    """Draw words to judge by, and others to learn from."""
    drawn = random.Random(1).sample(words, held_out + learnt)
    return drawn[:held_out], drawn[held_out:]


def _batches(words: Sequence[Entry]) -> list[Batch]:
    """Batches of words of about one length, so that little of them is padding."""
    ordered = sorted(words, key=lambda entry: len(entry.word))
    return [_batch(ordered[start : start + BATCH]) for start in range(0, len(ordered), BATCH)]


def _batch(words: Sequence[Entry]) -> Batch:
    rows = [torch.tensor((*entry.phones, STOP)) for entry in words]
    return *teacher_inputs(words), pad_sequence(rows, batch_first=True)


def save_files(compact: fxprune.Compact, example: Sequence[Entry], folder: Path) -> Files:
    """Write the compact model, its encoder and its decoder step as ONNX into a new folder."""
    folder.mkdir()
    files = Files(*(folder / f"{name}.onnx" for name in ("whole", "encoder", "step")))
    compact.save_onnx(files.whole)
    small = from_state(compact.module.state_dict())
    letters, lengths, phones = teacher_inputs(example)
    state = torch.zeros(len(example), small.enc.hidden_size)
    _lower(Encoder(small), (letters, lengths), files.encoder)
    _lower(DecoderStep(small), (phones[:, 1], state), files.step)
    return files


def _lower(part: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    nothing = Magnitude(sparsity=0.0)  # the part is small already
    fxprune.compile(part, nothing, example_inputs=inputs, progress=False).save_onnx(path)


def open_parts(files: Files) -> tuple[Encode, DecodeStep]:
    """Open encoder and decoder step in onnxruntime."""
    encode_session, step_session = open_session(files.encoder), open_session(files.step)

    def encode(letters: Tensor, lengths: Tensor) -> Tensor:
        feeds = {"letters": letters.numpy(), "lengths": lengths.numpy()}
        return torch.from_numpy(encode_session.run(None, feeds)[0])

    def step(token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        feeds = {"token": token.numpy(), "state": state.numpy()}
        logits, state_next = map(torch.from_numpy, step_session.run(None, feeds))
        return logits, state_next

    return encode, step


@dataclass(frozen=True)
class Quality:
    """How well the files of a model pronounce.

    Attributes:
        rates: error rates on the words asked for.
        same_answers: share of the words said as the unpruned model says them.
        step_error: largest difference of a logit between the decoder step, called once per
            phone, and the whole model's file.
    """

    rates: ErrorRates
    same_answers: float
    step_error: float


def judge(files: Files, dense: Seq2Seq, words: Sequence[Entry]) -> Quality:
    """Pronounce words with the encoder and the decoder step in onnxruntime."""
    encode, step = open_parts(files)
    asked = [entry.word for entry in words[:500]]
    said = decode(encode, step, asked)
    before = decode(Encoder(dense), DecoderStep(dense), asked)
    inputs = teacher_inputs(words[:50])
    feeds = dict(zip(("letters", "lengths", "phones"), (t.numpy() for t in inputs), strict=True))
    whole = torch.from_numpy(open_session(files.whole).run(None, feeds)[0])
    return Quality(
        rates=evaluate(encode, step, words),
        same_answers=sum(a == b for a, b in zip(said, before, strict=True)) / len(asked),
        step_error=float((step_through(encode, step, *inputs) - whole).abs().max()),
    )


def measure_curve(
    model: Seq2Seq,
    words: Sequence[Entry],
    sparsities: Sequence[float],
    folder: Path,
    task: fxprune.Task | None = None,
) -> list[Point[Quality]]:
    """Prune at each sparsity and measure the files written to ``folder``, the first one dense.

    Files count together, encoder and decoder step; the speed-up is that of a decoder step.
    """
    example = words[:EXAMPLE]
    dense: Path | None = None
    points: list[Point[Quality]] = []
    for sparsity in track(sparsities, "pruning", console=Console(stderr=True), transient=True):
        compact = prune(model, example, sparsity)
        files = save_files(compact, example, folder / f"g2p_en_{sparsity:.2f}")
        trained = None
        if task is not None:
            learnt = prune(model, example, sparsity, task)
            learnt_files = save_files(learnt, example, folder / f"g2p_en_{sparsity:.2f}_trained")
            trained = judge(learnt_files, model, words)
        dense = dense or files.step
        timed = compare(dense, files.step, runs=RUNS)
        points.append(
            Point(
                sparsity=sparsity,
                state=from_state(compact.module.state_dict()).enc.hidden_size,
                parameters=compact.report.parameters_after,
                macs=compact.report.macs_after,
                file_bytes=files.encoder.stat().st_size + files.step.stat().st_size,
                speedup=timed.speedup,
                quality=judge(files, model, words),
                trained=trained,
            )
        )
    return points


def quality_table(title: str, points: Sequence[tuple[float, Quality]]) -> Table:
    """Show how well each sparsity pronounces."""
    heads = "removed|phoneme errors|word errors|same words|step - whole"
    rows = (
        (
            f"{sparsity:.0%}",
            f"{q.rates.phoneme:.2%}",
            f"{q.rates.word:.2%}",
            f"{q.same_answers:.1%}",
            f"{q.step_error:.1e}",
        )
        for sparsity, q in points
    )
    return make_table(title, heads, rows)


def draw(points: Sequence[Point[Quality]], path: Path) -> None:
    """Draw the curve."""
    quality = {"words right": [1 - p.quality.rates.word for p in points]}
    trained = [1 - p.trained.rates.word for p in points if p.trained is not None]
    if trained:
        quality["words right, trained"] = trained
    cost = cost_curves(points, "decoder step")
    draw_curve(path, "g2p_en", [p.sparsity for p in points], quality, cost)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = curve_options(
        "Remove neurons of g2p_en and report size, speed and error rates of the two ONNX files "
        "(encoder, decoder step) that pronounce words greedily.",
        DATA_HELP,
    )
    options = parser.parse_args(argv)
    try:
        model = load_model(options.data)
        sample, others = split_dictionary(read_dictionary(options.data))
    except FileNotFoundError as error:
        parser.error(str(error))
    task = spelling_task(others, options.epochs) if options.epochs else None
    sparsities = sorted({0.0, *options.sparsity})
    with TemporaryDirectory() as scratch:
        points = measure_curve(model, sample, sparsities, options.keep or Path(scratch), task)
    sizes = size_table("g2p_en, encoder and decoder step", f"MACs, {EXAMPLE} words", points)
    print_curve(points, sizes, quality_table, options.epochs)
    if options.plot:
        draw(points, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
