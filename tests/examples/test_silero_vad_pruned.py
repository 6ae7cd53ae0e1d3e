"""Pruned voice activity detectors: both forms lose the same neurons and their files agree."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from examples import silero_vad, silero_vad_pruned
from examples.silero_vad import Floats, Recording, SileroVad, SileroVadSequence


@pytest.fixture(scope="module")
def models(data_dir: Path) -> tuple[SileroVad, SileroVadSequence]:
    return silero_vad.load_models(data_dir)


@pytest.fixture(scope="module")
def digits(data_dir: Path) -> list[Floats]:
    return silero_vad.read_digits(data_dir)


@pytest.fixture(scope="module")
def recording(digits: Sequence[Floats]) -> Recording:
    return silero_vad.make_recording(digits, count=2)


def parameters(bins: int, widths: Sequence[int], hidden: int) -> int:
    """Count from the description: widths of the four convolutions, units of the cell."""
    kernels = zip((bins, *widths), widths, strict=False)
    convolutions = sum((3 * source + 1) * width for source, width in kernels)
    return 2 * bins * 256 + convolutions + 4 * hidden * (widths[-1] + hidden + 2) + hidden + 1


def test_streaming_loop_equals_whole_run_and_state_shrinks(
    models: tuple[SileroVad, SileroVadSequence],
    recording: Recording,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    pair = silero_vad_pruned.prune(models, recording.chunks[:, :8], 0.5)
    assert pair[0].report.parameters_before == parameters(129, (128, 64, 64, 128), 128)
    assert pair[0].report.parameters_after == parameters(129, (64, 32, 32, 64), 64)
    whole_kept = pair[1].report.kept
    streaming_kept = {silero_vad_pruned.streaming_name(n): kept for n, kept in whole_kept.items()}
    assert streaming_kept == pair[0].report.kept
    authors = silero_vad.run_authors_file(data_dir, recording.chunks)
    quality = silero_vad_pruned.judge(pair, recording, authors, tmp_path / "half.onnx")
    assert quality.loop_error <= 1e-5
    assert quality.change > 0.1  # half of the neurons do matter
    step = silero_vad_pruned.onnx_step(tmp_path / "half.onnx")
    with torch.no_grad():
        state = torch.zeros(1, 64)
        results = step(recording.chunks[:, 0], state, state)
        expected = pair[0].module(recording.chunks[:, 0], state, state)
    for actual, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-5)


def test_training_leaves_the_basis_and_reaches_both_forms(
    models: tuple[SileroVad, SileroVadSequence],
    recording: Recording,
    digits: Sequence[Floats],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silero_vad_pruned, "BATCHES", 2)
    monkeypatch.setattr(silero_vad_pruned, "BATCH", 2)
    monkeypatch.setattr(silero_vad_pruned, "LENGTH", 24)
    task = silero_vad_pruned.distillation(models[1], digits, epochs=2)
    step, whole = silero_vad_pruned.prune(models, recording.chunks[:, :8], 0.3, task)
    small = step.module.get_parameter("lstm_cell.weight_ih")
    rows = torch.tensor(step.report.kept["lstm_cell.weight_ih"][0])
    columns = torch.tensor(step.report.kept["lstm_cell.weight_ih"][1])
    untrained = models[0].lstm_cell.weight_ih.detach()[rows][:, columns]
    assert not torch.equal(small, untrained)
    assert torch.equal(step.module.get_parameter("stft_conv.weight"), models[0].stft_conv.weight)
    units = step.module.get_parameter("lstm_cell.weight_hh").shape[1]
    zeros = torch.zeros(1, units)
    with torch.no_grad():
        expected = whole.module(recording.chunks, zeros, zeros)[0]
    streamed = silero_vad.stream(step.module, recording.chunks, units)
    torch.testing.assert_close(streamed, expected, rtol=0, atol=1e-5)


def test_script_prints_and_draws_the_dense_model(
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silero_vad_pruned, "RUNS", 3)
    picture = tmp_path / "curve.png"
    arguments = ["--data", str(data_dir), "--sparsity", "--plot", str(picture)]
    assert silero_vad_pruned.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "309,633" in printed and "679,552" in printed
    assert "100.00%" in printed  # every decision of the authors' file
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_data_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        silero_vad_pruned.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert "models/silero_vad/weights.pt is missing" in " ".join(capsys.readouterr().err.split())
