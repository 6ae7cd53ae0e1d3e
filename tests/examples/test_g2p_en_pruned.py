"""Pruned grapheme-to-phoneme models: their halves, run step by step, are the whole."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from examples import g2p_en, g2p_en_pruned
from examples.g2p_en import Entry, Seq2Seq


@pytest.fixture(scope="module")
def model(data_dir: Path) -> Seq2Seq:
    return g2p_en.load_model(data_dir)


@pytest.fixture(scope="module")
def words(data_dir: Path) -> list[Entry]:
    return g2p_en.read_dictionary(data_dir)[:600]


def parameters(letter_width: int, phone_width: int, hidden: int) -> int:
    """Count from the description."""
    embeddings = 29 * letter_width + 74 * phone_width
    grus = sum(3 * hidden * (width + hidden + 2) for width in (letter_width, phone_width))
    return embeddings + grus + 74 * (hidden + 1)


def test_halves_step_by_step_are_the_whole(
    model: Seq2Seq, words: Sequence[Entry], tmp_path: Path
) -> None:
    compact = g2p_en_pruned.prune(model, words[:8], 0.5)
    assert compact.report.parameters_before == parameters(256, 256, 256)
    assert compact.report.parameters_after == parameters(128, 128, 128)
    files = g2p_en_pruned.save_files(compact, words[:8], tmp_path / "half")
    quality = g2p_en_pruned.judge(files, model, words[:60])
    assert quality.step_error <= 1e-4
    assert quality.rates.word > 0.5  # half of the neurons do matter
    small = g2p_en.from_state(compact.module.state_dict())
    plain = g2p_en.evaluate(g2p_en.Encoder(small), g2p_en.DecoderStep(small), words[:60])
    assert quality.rates == plain


def test_training_helps(
    model: Seq2Seq, words: Sequence[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(g2p_en_pruned, "HELD_OUT", 64)
    monkeypatch.setattr(g2p_en_pruned, "LEARNT", 256)
    task = g2p_en_pruned.spelling_task(words, epochs=1)
    assert len(list(task.train)) == 4
    before = g2p_en_pruned.prune(model, words[:8], 0.3)
    after = g2p_en_pruned.prune(model, words[:8], 0.3, task)
    assert after.report.kept == before.report.kept
    assert task.validate(after.module) < task.validate(before.module)


def test_words_learnt_are_apart_from_those_judged_by(words: Sequence[Entry]) -> None:
    parts = g2p_en_pruned.choose_words(words, held_out=100, learnt=300)
    assert [len(part) for part in parts] == [100, 300]
    assert len({entry.word for part in parts for entry in part}) == 400


def test_script_prints_and_draws_the_dense_model(
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(g2p_en, "SAMPLE", 60)
    monkeypatch.setattr(g2p_en_pruned, "RUNS", 3)
    picture = tmp_path / "curve.png"
    arguments = ["--data", str(data_dir), "--sparsity", "--plot", str(picture)]
    assert g2p_en_pruned.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "834,890" in printed
    assert "100.0%" in printed  # every word as before
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_data_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        g2p_en_pruned.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert "models/g2p_en/weights.pt is missing" in " ".join(capsys.readouterr().err.split())
