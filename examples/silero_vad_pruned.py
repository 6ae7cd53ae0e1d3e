"""Prune silero-vad and run the result in a streaming loop, its state as small as its LSTM.

    python -m examples.silero_vad_pruned --data PATH --epochs 10 --plot silero_vad.png

Both forms of the model are compiled under one policy, each from its own graph. They hold the same
weights, so the same neurons go, and their two ONNX files must agree: one run chunk by chunk with
the state handed over, one run on the whole recording. The Fourier basis of the first layer is no
trained weight and is protected.

With ``--epochs`` every pruned model also learns to answer as the whole model does, on spoken
digits that the measurements do not use. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

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
from examples.silero_vad import (
    DATA_HELP,
    HIDDEN,
    Floats,
    Recording,
    SileroVad,
    SileroVadSequence,
    Step,
    load_models,
    make_recording,
    max_difference,
    ranking_accuracy,
    read_digits,
    run_authors_file,
    run_sequence,
    stream,
)
from fxprune.latency import compare
from fxprune.passes import Magnitude

RUNS = 500  # timed calls of each file
BATCHES, BATCH, LENGTH = 20, 8, 192  # recordings to learn from, in chunks of 32 ms

Models = tuple[SileroVad, SileroVadSequence]
Pair = tuple[fxprune.Compact, fxprune.Compact]
Batch = tuple[Tensor, Tensor, Tensor]  # chunks, probabilities to learn, zero states


def prune(
    models: Models, example: Tensor, sparsity: float, task: fxprune.Task | None = None
) -> Pair:
    """Remove a fraction of the neurons of both forms; a task also trains the weights that stay.

    Args:
        models: the streaming and the whole-recording form.
        example: some chunks [1, chunks, WINDOW].
        sparsity: fraction of each layer's neurons to remove.
        task: trains the whole-recording form, from which the streaming form gets its weights.
    """
    policy = fxprune.Policy(
        [Magnitude(sparsity=sparsity, structure="neuron")],
        protect=["stft_conv.weight"],
        states="shrink",
    )
    zeros = torch.zeros(1, HIDDEN)
    batch, time = torch.export.Dim.AUTO, torch.export.Dim.AUTO  # a chunk's samples stay as many
    step = fxprune.compile(
        models[0],
        policy,
        example_inputs=(example[:, 0], zeros, zeros),
        dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
        progress=False,
    )
    whole = fxprune.compile(
        models[1],
        policy,
        example_inputs=(example, zeros, zeros),
        dynamic_shapes=({0: batch, 1: time}, {0: batch}, {0: batch}),
        task=task,
        progress=False,
    )
    if task is not None:
        trained = whole.module.state_dict()
        step.module.load_state_dict({streaming_name(n): t for n, t in trained.items()})
    return step, whole


def streaming_name(name: str) -> str:
    """Name in the nn.LSTMCell of what the nn.LSTM calls ``name``."""
    return name.replace("lstm.", "lstm_cell.").removesuffix("_l0")


def distillation(model: SileroVadSequence, digits: Sequence[Floats], epochs: int) -> fxprune.Task:
    """Learn to answer as ``model`` does, judged on recordings apart from those learnt from."""
    *train, held_out = (_batch(model, digits, number) for number in range(BATCHES + 1))

    def loss(pruned: nn.Module, batch: Batch) -> Tensor:
        chunks, probabilities, zeros = batch
        return F.binary_cross_entropy(pruned(chunks, zeros, zeros)[0], probabilities)

    def validate(pruned: nn.Module) -> float:
        return loss(pruned, held_out).item()

    return fxprune.Task(loss, train, validate, goal="min", epochs=epochs, clip=1.0)


def _batch(model: SileroVadSequence, digits: Sequence[Floats], number: int) -> Batch:
    seeds = range(number * BATCH, (number + 1) * BATCH)
    recordings = [make_recording(digits, count=20, seed=seed) for seed in seeds]
    chunks = torch.cat([recording.chunks[:, :LENGTH] for recording in recordings])
    return chunks, run_sequence(model, chunks), torch.zeros(BATCH, HIDDEN)


@dataclass(frozen=True)
class Quality:
    """How well a pair of ONNX files judges a recording (probabilities at 0.5).

    Attributes:
        change: largest difference of a probability from the authors' file.
        decisions_kept: share of the chunks judged as the authors' file judges them.
        ranking: area under the ROC curve against the truth.
        loop_error: largest difference of the streaming loop from the whole-recording run.
    """

    change: float
    decisions_kept: float
    ranking: float
    loop_error: float


def measure_curve(
    models: Models,
    recording: Recording,
    authors: Tensor,
    sparsities: Sequence[float],
    folder: Path,
    task: fxprune.Task | None = None,
) -> list[Point[Quality]]:
    """Prune at each sparsity and measure the files written to ``folder``, the first one dense.

    The speed-up is that of one call of the streaming file.
    """
    dense = folder / _file_name(0.0)
    points: list[Point[Quality]] = []
    for sparsity in track(sparsities, "pruning", console=Console(stderr=True), transient=True):
        pair = prune(models, recording.chunks[:, :8], sparsity)
        file = folder / _file_name(sparsity)
        quality = judge(pair, recording, authors, file)
        trained = None
        if task is not None:
            learnt = prune(models, recording.chunks[:, :8], sparsity, task)
            trained = judge(learnt, recording, authors, file.with_stem(f"{file.stem}_trained"))
        timed = compare(dense, file, runs=RUNS)
        report = pair[0].report
        points.append(
            Point(
                sparsity=sparsity,
                state=_state_units(file),
                parameters=report.parameters_after,
                macs=report.macs_after,
                file_bytes=timed.second.bytes,
                speedup=timed.speedup,
                quality=quality,
                trained=trained,
            )
        )
    return points


def _file_name(sparsity: float) -> str:
    return f"silero_vad_{sparsity:.2f}.onnx"


def judge(pair: Pair, recording: Recording, authors: Tensor, path: Path) -> Quality:
    """Write both forms as ONNX, the streaming one to ``path``, and run them in onnxruntime."""
    whole_path = path.with_stem(f"{path.stem}_whole")
    pair[0].save_onnx(path)
    pair[1].save_onnx(whole_path)
    streamed = stream(onnx_step(path), recording.chunks, _state_units(path))
    zeros = torch.zeros(1, _state_units(whole_path))
    whole = onnx_step(whole_path)(recording.chunks, zeros, zeros)[0]
    return Quality(
        change=max_difference(streamed, authors),
        decisions_kept=float(((streamed > 0.5) == (authors > 0.5)).float().mean()),
        ranking=ranking_accuracy(streamed, recording.speech),
        loop_error=max_difference(streamed, whole),
    )


def onnx_step(path: Path) -> Step:
    """Open a file of either form: a function like its ``forward``."""
    session = open_session(path)

    def step(audio: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feeds = {"audio": audio.numpy(), "h": h.numpy(), "c": c.numpy()}
        probability, h_next, c_next = map(torch.from_numpy, session.run(None, feeds))
        return probability, h_next, c_next

    return step


def _state_units(path: Path) -> int:
    shapes = {node.name: node.shape for node in open_session(path).get_inputs()}
    return int(shapes["h"][-1])


def quality_table(title: str, points: Sequence[tuple[float, Quality]]) -> Table:
    """Show how well each sparsity judges."""
    heads = "removed|largest change|decisions kept|ranking|loop - whole"
    rows = (
        (
            f"{sparsity:.0%}",
            f"{q.change:.1e}",
            f"{q.decisions_kept:.2%}",
            f"{q.ranking:.2%}",
            f"{q.loop_error:.1e}",
        )
        for sparsity, q in points
    )
    return make_table(title, heads, rows)


def draw(points: Sequence[Point[Quality]], path: Path) -> None:
    """Draw the curve."""
    quality = {"decisions kept": [p.quality.decisions_kept for p in points]}
    trained = [p.trained.decisions_kept for p in points if p.trained is not None]
    if trained:
        quality["decisions kept, trained"] = trained
    cost = cost_curves(points, "chunk")
    draw_curve(path, "silero-vad", [p.sparsity for p in points], quality, cost)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = curve_options(
        "Remove neurons of silero-vad and report size, speed and agreement of the compact ONNX "
        "file in a streaming loop. The state that the loop carries shrinks with the model.",
        DATA_HELP,
    )
    options = parser.parse_args(argv)
    try:
        models = load_models(options.data)
        recording = make_recording(read_digits(options.data))
        authors = run_authors_file(options.data, recording.chunks)
    except FileNotFoundError as error:
        parser.error(str(error))
    task = None
    if options.epochs:
        task = distillation(models[1], read_digits(options.data, train=True), options.epochs)
    sparsities = sorted({0.0, *options.sparsity})
    with TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        points = measure_curve(models, recording, authors, sparsities, folder, task)
    sizes = size_table("silero-vad, streaming form", "MACs/chunk", points)
    print_curve(points, sizes, quality_table, options.epochs)
    if options.plot:
        draw(points, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
