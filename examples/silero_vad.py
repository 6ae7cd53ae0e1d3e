"""silero-vad, a published voice activity detector, written from its description.

The model (snakers4/silero-vad, MIT; 16 kHz branch) hears 32 ms of audio at a time, keeps an LSTM
state between calls, and answers with the probability that somebody is speaking. It is written here
in two forms that share their weights: :class:`SileroVad`, one chunk per call, which is what a
device runs, and :class:`SileroVadSequence`, a whole recording per call, which is what a test or a
training loop runs.

    python -m examples.silero_vad --data PATH

In float64 the model and the authors' ONNX graph agree to 1e-13 (a test). In float32 they differ by
rounding: by 1e-6 to 4e-6 on speech and noise, by up to 3e-5 where speech gives way to exact zeros,
where the authors' file is itself up to 7e-6 from the float64 result.
:mod:`examples.silero_vad_pruned` removes neurons from it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.nn import functional as F

from examples.curves import open_session

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

DATA_HELP = "folder with models/silero_vad/ (weights.pt, *.onnx) and fsdd/fsdd_8k_int16.npz"

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
    """Load the published weights into both forms, in eval mode; their Fourier basis is fixed."""
    state = torch.load(_existing(data / "models/silero_vad/weights.pt"), weights_only=True)
    streaming, sequence = SileroVad(), SileroVadSequence()
    streaming.load_state_dict(state, strict=True)
    sequence.load_state_dict({_sequence_name(name): value for name, value in state.items()})
    for model in (streaming, sequence):
        model.eval().stft_conv.requires_grad_(False)
    return streaming, sequence


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


def read_digits(data: Path, train: bool = False) -> list[Floats]:
    """Read spoken digits (free-spoken-digit-dataset, 8 kHz): its test takes, or the others."""
    archive = np.load(_existing(data / "fsdd/fsdd_8k_int16.npz"))
    audio = archive["audio"].astype(np.float32) / 32_768
    digits = np.split(audio, archive["offsets"][1:-1])
    return [d for d, take in zip(digits, archive["take"], strict=True) if (take > 4) == train]


def make_recording(
    digits: Sequence[Floats], gaps: Sequence[float] = GAPS["all"], count: int = 40, seed: int = 0
) -> Recording:
    """Join spoken digits, with gaps of white noise between them.

    Args:
        digits: what to choose from, 8 kHz.
        gaps: noise levels to draw from, 0 for exact silence; none: no gaps.
        count: how many digits to join.
        seed: chooses the digits, and the level and length of each gap.
    """
    generator = np.random.default_rng(seed)
    pieces: list[Floats] = []
    spoken: list[NDArray[np.bool_]] = []
    for index in generator.choice(len(digits), size=count, replace=False):
        if gaps:
            noise = generator.standard_normal(generator.integers(RATE // 4, RATE))
            pieces.append((generator.choice(gaps) * noise).astype(np.float32))
            spoken.append(np.zeros(len(noise), bool))
        pieces.append(resample_poly(digits[index], 2, 1).astype(np.float32))
        spoken.append(np.ones(len(pieces[-1]), bool))
    chunks = sum(map(len, pieces)) // CHUNK
    joined = np.concatenate(pieces)[: chunks * CHUNK].clip(-1, 1)
    truth = np.concatenate(spoken)[: chunks * CHUNK].reshape(chunks, CHUNK).mean(axis=1) >= 0.5
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
    session = open_session(_existing(data / "models/silero_vad/silero_vad_16k_op15.onnx"))
    rate = np.array(RATE, dtype=np.int64)
    state = np.zeros((2, 1, HIDDEN), dtype=np.float32)
    probabilities = []
    for chunk in chunks.unbind(1):
        feeds = {"input": chunk.numpy(), "state": state, "sr": rate}
        probability, state = session.run(None, feeds)
        probabilities.append(torch.from_numpy(probability))
    return torch.cat(probabilities, dim=1)


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


def agreement_table(data: Path) -> Table:
    """Compare both forms with the authors' file, and that file with the model in float64."""
    streaming, sequence = load_models(data)
    digits = read_digits(data)
    exact = copy.deepcopy(sequence).double()
    table = Table(title="silero-vad: largest difference from the authors' ONNX file (a)")
    table.add_column("audio")
    for head in "chunks|streaming - a|whole - a|a - float64".split("|"):
        table.add_column(head, justify="right")
    for kind, gaps in GAPS.items():
        chunks = make_recording(digits, gaps).chunks
        authors = run_authors_file(data, chunks)
        table.add_row(
            kind,
            f"{chunks.shape[1]:,}",
            f"{max_difference(stream(streaming, chunks), authors):.1e}",
            f"{max_difference(run_sequence(sequence, chunks), authors):.1e}",
            f"{max_difference(run_sequence(exact, chunks.double()), authors):.1e}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Reproduce silero-vad from its weights: the largest difference from the "
        "authors' ONNX file over speech, noise and silence."
    )
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    options = parser.parse_args(argv)
    try:
        table = agreement_table(options.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
