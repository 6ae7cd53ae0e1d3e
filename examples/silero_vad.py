"""Prune silero-vad, a published voice activity detector, and run the result in a streaming loop.

The model (snakers4/silero-vad, MIT; 16 kHz branch) hears 32 ms of audio at a time, keeps an LSTM
state between calls, and answers with the probability that somebody is speaking. It is written here
in two forms that share their weights: :class:`SileroVad`, one chunk per call, which is what a
device runs, and :class:`SileroVadSequence`, a whole recording per call, which is what a test or a
training loop runs.

    python examples/silero_vad.py --data PATH

In float64 the model and the authors' ONNX graph agree to 1e-13 (a test). In float32 they differ by
rounding: by 1e-6 to 4e-6 on speech and noise, by up to 3e-5 where speech gives way to exact zeros,
where the authors' file is itself 1.5e-5 from the float64 result.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.nn import functional as F

RATE = 16_000  # samples per second
CHUNK = 512  # new samples per call
CONTEXT = 64  # samples of the chunk before, repeated in front of the new ones
WINDOW = CONTEXT + CHUNK
BINS = 129  # frequencies of the 256-point Fourier transform that stft_conv computes
HIDDEN = 128
GAPS = {  # noise levels between the spoken digits
    "speech": (),
    "speech, noise": (1e-3, 1e-2, 5e-2),
    "speech, digital silence": (0.0,),
    "all": (0.0, 1e-3, 1e-2, 5e-2),
}
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

Floats = NDArray[np.float32]
# (audio [batch, WINDOW], h, c) -> (probability [batch], h, c)
Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class ChunkEncoder(nn.Module):
    """The layers without memory: spectrum, four convolutions, and the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * BINS, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(BINS, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, HIDDEN, 3, padding=1)
        self.final_conv = nn.Conv1d(HIDDEN, 1, 1)

    def encode(self, audio: Tensor) -> Tensor:
        """Turn chunks of audio [n, WINDOW] into features [n, HIDDEN]."""
        padded = F.pad(audio.unsqueeze(1), (0, 64), mode="reflect")  # [n, 1, 640]
        spectrum = self.stft_conv(padded)  # [n, 258, 4]: real parts, then imaginary parts
        real, imaginary = spectrum[:, :BINS], spectrum[:, BINS:]
        features = torch.sqrt(real**2 + imaginary**2)  # [n, 129, 4]
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            features = torch.relu(convolution(features))  # times 4, 2, 1, 1
        return features.squeeze(2)

    def detect(self, hidden: Tensor) -> Tensor:
        """Turn hidden states [batch, HIDDEN, time] into probabilities [batch, time]."""
        return torch.sigmoid(self.final_conv(torch.relu(hidden))).squeeze(1)


class SileroVad(ChunkEncoder):
    """The streaming form: one chunk per call, the state passed in and handed back."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm_cell = nn.LSTMCell(HIDDEN, HIDDEN)

    def forward(self, audio: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Judge one chunk.

        Args:
            audio: [batch, WINDOW], in [-1, 1], the first CONTEXT samples from the chunk before.
            h: hidden state [batch, HIDDEN], zeros at the start of a recording.
            c: cell state [batch, HIDDEN], likewise.

        Returns:
            The probability of speech [batch], and the two states for the next call.
        """
        h, c = self.lstm_cell(self.encode(audio), (h, c))
        return self.detect(h.unsqueeze(2)).squeeze(1), h, c


class SileroVadSequence(ChunkEncoder):
    """The whole-recording form: convolutions over all chunks at once, then one LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, audio: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Judge all chunks [batch, chunks, WINDOW]: probabilities [batch, chunks], and states."""
        batch, chunks, window = audio.shape
        features = self.encode(audio.reshape(batch * chunks, window))
        features = features.reshape(batch, chunks, features.shape[1])
        hidden, (h_n, c_n) = self.lstm(features, (h.unsqueeze(0), c.unsqueeze(0)))
        return self.detect(hidden.transpose(1, 2)), h_n.squeeze(0), c_n.squeeze(0)


def load_models(data: Path) -> tuple[SileroVad, SileroVadSequence]:
    """Load the published weights into both forms, in eval mode."""
    state = torch.load(_existing(data / "models/silero_vad/weights.pt"), weights_only=True)
    streaming, sequence = SileroVad(), SileroVadSequence()
    streaming.load_state_dict(state, strict=True)
    sequence.load_state_dict({_sequence_name(name): value for name, value in state.items()})
    return streaming.eval(), sequence.eval()


def _sequence_name(name: str) -> str:
    """Name in the nn.LSTM of what the nn.LSTMCell calls ``name``."""
    return name.replace("lstm_cell.", "lstm.") + "_l0" if name.startswith("lstm_cell.") else name


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --data must name a folder that holds models/silero_vad/ "
            "(weights.pt, silero_vad_16k_op15.onnx) and fsdd/fsdd_8k_int16.npz"
        )
    return path


@dataclass(frozen=True)
class Recording:
    """Audio to judge, with the truth known because it was put together here.

    Attributes:
        chunks: [1, chunks, WINDOW], float32 in [-1, 1].
        speech: [chunks], True where at least half of the new samples are a spoken digit.
    """

    chunks: Tensor
    speech: NDArray[np.bool_]


def make_recording(
    data: Path, gaps: Sequence[float] = GAPS["all"], digits: int = 40, seed: int = 0
) -> Recording:
    """Join spoken digits (free-spoken-digit-dataset), with gaps of white noise between them.

    Args:
        data: the data folder.
        gaps: noise levels to draw from, 0 for exact silence; none: no gaps.
        digits: how many spoken digits.
        seed: chooses the digits, and the level and length of each gap.
    """
    archive = np.load(_existing(data / "fsdd/fsdd_8k_int16.npz"))
    audio, offsets = archive["audio"], archive["offsets"]
    generator = np.random.default_rng(seed)
    pieces: list[Floats] = []
    spoken: list[NDArray[np.bool_]] = []
    for take in generator.choice(len(offsets) - 1, size=digits, replace=False):
        digit = audio[offsets[take] : offsets[take + 1]] / 32_768
        if gaps:
            noise = generator.standard_normal(generator.integers(RATE // 4, RATE))
            pieces.append((generator.choice(gaps) * noise).astype(np.float32))
            spoken.append(np.zeros(len(noise), bool))
        pieces.append(resample_poly(digit, 2, 1).astype(np.float32))
        spoken.append(np.ones(len(pieces[-1]), bool))
    count = sum(map(len, pieces)) // CHUNK
    joined = np.concatenate(pieces)[: count * CHUNK].clip(-1, 1)
    truth = np.concatenate(spoken)[: count * CHUNK].reshape(count, CHUNK).mean(axis=1) >= 0.5
    return Recording(split_chunks(torch.from_numpy(joined).unsqueeze(0)), truth)


def split_chunks(audio: Tensor) -> Tensor:
    """Cut audio [batch, chunks * CHUNK] into overlapping windows [batch, chunks, WINDOW]."""
    return F.pad(audio, (CONTEXT, 0)).unfold(1, WINDOW, CHUNK)


def stream(step: Step, chunks: Tensor, hidden: int = HIDDEN) -> Tensor:
    """Run a streaming model over all chunks: probabilities [batch, chunks]."""
    h = c = torch.zeros(len(chunks), hidden)
    probabilities = []
    with torch.no_grad():
        for chunk in chunks.unbind(1):
            probability, h, c = step(chunk, h, c)
            probabilities.append(probability)
    return torch.stack(probabilities, dim=1)


def run_sequence(model: nn.Module, chunks: Tensor) -> Tensor:
    """Run the whole-recording form from zero states: probabilities [batch, chunks]."""
    zeros = torch.zeros(len(chunks), HIDDEN, dtype=chunks.dtype)
    with torch.no_grad():
        probabilities: Tensor = model(chunks, zeros, zeros)[0]
    return probabilities


def run_authors_file(data: Path, chunks: Tensor) -> Tensor:
    """Run the ONNX file that the authors publish: probabilities [1, chunks]."""
    session = _session(_existing(data / "models/silero_vad/silero_vad_16k_op15.onnx"))
    rate = np.array(RATE, dtype=np.int64)
    state = np.zeros((2, 1, HIDDEN), dtype=np.float32)
    probabilities = []
    for chunk in chunks.unbind(1):
        feeds = {"input": chunk.numpy(), "state": state, "sr": rate}
        probability, state = session.run(None, feeds)
        probabilities.append(torch.from_numpy(probability))
    return torch.cat(probabilities, dim=1)


def _session(path: Path) -> Any:  # onnxruntime ships no annotations
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # the authors' file holds initializers that nothing reads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def max_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference of two tensors of the same shape."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a - b).abs().max())


def ranking_accuracy(probabilities: Tensor, speech: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a speech chunk outranks another, ties counting half."""
    scores = probabilities.flatten().numpy()
    others = np.sort(scores[~speech])
    below = np.searchsorted(others, scores[speech], side="left")
    not_above = np.searchsorted(others, scores[speech], side="right")
    return float((below + not_above).mean() / (2 * len(others)))


@dataclass(frozen=True)
class Point:
    """One row of the pruning curve, measured on the ONNX file (probabilities at 0.5)."""

    sparsity: float
    parameters: int
    macs: int
    file_bytes: int
    microseconds: float  # per chunk of 32 ms, in the streaming loop
    decisions_kept: float  # chunks judged as the unpruned model judges them
    ranking: float
    loop_error: float  # streaming loop against whole-recording run


def prune_and_measure(
    models: tuple[SileroVad, SileroVadSequence],
    recording: Recording,
    sparsity: float,
    folder: Path,
) -> Point:
    """Remove a fraction of the neurons, in one shot and without training, and measure the file.

    Both forms are compiled under the same policy, each from its own graph. They hold the same
    weights, so the same neurons go, and the two files must agree.
    """
    import fxprune
    from fxprune.passes import Magnitude

    policy = fxprune.Policy([Magnitude(sparsity=sparsity, structure="neuron")], states="shrink")
    streaming, sequence = models
    zeros = torch.zeros(1, HIDDEN)
    chunks = recording.chunks
    compact = fxprune.compile(
        streaming, policy, example_inputs=(chunks[:, 0], zeros, zeros), progress=False
    )
    whole = fxprune.compile(
        sequence, policy, example_inputs=(chunks[:, :8], zeros, zeros), progress=False
    )
    step_file = compact.save_onnx(folder / f"silero_vad_{sparsity:.2f}.onnx")
    whole_file = whole.save_onnx(folder / f"silero_vad_sequence_{sparsity:.2f}.onnx")
    step, hidden = onnx_step(step_file.path)
    begin = time.perf_counter()
    probabilities = stream(step, chunks, hidden)
    elapsed = time.perf_counter() - begin
    dense = run_sequence(sequence, chunks)
    whole_step, hidden = onnx_step(whole_file.path)
    whole_zeros = torch.zeros(1, hidden)
    return Point(
        sparsity=sparsity,
        parameters=compact.report.parameters_after,
        macs=compact.report.macs_after,
        file_bytes=step_file.bytes,
        microseconds=elapsed / chunks.shape[1] * 1e6,
        decisions_kept=float(((probabilities > 0.5) == (dense > 0.5)).float().mean()),
        ranking=ranking_accuracy(probabilities, recording.speech),
        loop_error=max_difference(probabilities, whole_step(chunks, whole_zeros, whole_zeros)[0]),
    )


def onnx_step(path: Path) -> tuple[Step, int]:
    """Open a compact file: a function like ``SileroVad.forward``, and its number of state units."""
    session = _session(path)
    hidden = int(session.get_inputs()[1].shape[-1])

    def step(audio: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feeds = {"audio": audio.numpy(), "h": h.numpy(), "c": c.numpy()}
        probability, h_next, c_next = map(torch.from_numpy, session.run(None, feeds))
        return probability, h_next, c_next

    return step, hidden


def agreement_table(data: Path) -> Table:
    """Compare both forms with the authors' file, and that file with the model in float64."""
    streaming, sequence = load_models(data)
    exact = copy.deepcopy(sequence).double()
    table = Table(title="silero-vad: largest difference from the authors' ONNX file (a)")
    table.add_column("audio")
    for head in "chunks|streaming - a|whole - a|a - float64".split("|"):
        table.add_column(head, justify="right")
    for kind, gaps in GAPS.items():
        chunks = make_recording(data, gaps).chunks
        authors = run_authors_file(data, chunks)
        table.add_row(
            kind,
            f"{chunks.shape[1]:,}",
            f"{max_difference(stream(streaming, chunks), authors):.1e}",
            f"{max_difference(run_sequence(sequence, chunks), authors):.1e}",
            f"{max_difference(run_sequence(exact, chunks.double()), authors):.1e}",
        )
    return table


def curve_table(points: Sequence[Point]) -> Table:
    """Show the pruning curve."""
    table = Table(title="neurons removed in one shot, no training")
    heads = "removed|parameters|MACs|ONNX bytes|us/chunk|decisions kept|ranking|loop - whole"
    for head in heads.split("|"):
        table.add_column(head, justify="right")
    for point in points:
        table.add_row(
            f"{point.sparsity:.0%}",
            f"{point.parameters:,}",
            f"{point.macs:,}",
            f"{point.file_bytes:,}",
            f"{point.microseconds:.0f}",
            f"{point.decisions_kept:.2%}",
            f"{point.ranking:.2%}",
            f"{point.loop_error:.1e}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Reproduce silero-vad from its weights (largest difference from the authors' "
        "ONNX file over speech, noise and silence), then remove neurons without any training and "
        "report size, speed and agreement of the compact ONNX file in a streaming loop. The state "
        "that the loop carries shrinks with the model.",
        epilog="example: python examples/silero_vad.py --data data --sparsity 0.2 0.5 --keep out",
    )
    data_help = "folder with models/silero_vad/ (weights.pt, *.onnx) and fsdd/fsdd_8k_int16.npz"
    parser.add_argument("--data", type=Path, required=True, help=data_help)
    sparsity_help = "fractions of the neurons to remove; none: only compare with the authors' file"
    parser.add_argument("--sparsity", type=float, nargs="*", default=SPARSITIES, help=sparsity_help)
    parser.add_argument("--keep", type=Path, help="existing folder in which to keep the ONNX files")
    options = parser.parse_args(argv)
    console = Console()
    try:
        console.print(agreement_table(options.data))
    except FileNotFoundError as error:
        parser.error(str(error))
    if options.sparsity:
        models, recording = load_models(options.data), make_recording(options.data)
        with TemporaryDirectory() as scratch:
            levels = track(options.sparsity, "pruning", console=console, transient=True)
            folder = options.keep or Path(scratch)
            points = [prune_and_measure(models, recording, level, folder) for level in levels]
        console.print(curve_table(points))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
