"""The sparse connectivity example: a small run that continues, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples import mnist, sparse_connectivity
from examples.result_lines import read_results


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random images, whose digit is how bright they are."""
    numbers = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for part, count in (("train", 420), ("test", 100)):
        digits = numbers.integers(0, 10, count)
        pixels = numbers.integers(0, 25, (count, 28, 28)) + 25 * digits[:, None, None]
        path = tmp_path / "mnist" / f"mnist_{part}.npz"
        np.savez(path, x=pixels.astype(np.uint8), y=digits.astype(np.uint8))
    monkeypatch.setattr(sparse_connectivity, "HELD_OUT", 100)
    monkeypatch.setattr(mnist, "BATCH", 32)
    return tmp_path


def test_runs_are_kept_and_not_done_again(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = data / "results.jsonl"
    options = ["--model", "gru", "--epochs", "4", "--seeds", "1", "--sparsity", "0.8"]
    call = ["--data", str(data), "--out", str(out), *options]
    assert sparse_connectivity.main([*call, "--methods", "learned"]) == 0
    assert [r["method"] for r in read_results(out)] == ["dense", "learned"]
    first = out.read_text()
    assert sparse_connectivity.main([*call, "--methods", "learned", "magnitude"]) == 0
    assert out.read_text().startswith(first)
    runs = read_results(out)
    assert [r["method"] for r in runs] == ["dense", "learned", "magnitude"]
    assert all(0.79 < r["removed"] < 0.83 for r in runs[1:])
    assert capsys.readouterr().out.count("| gru | learned | 80.0% |") == 2


def line(method: str, seed: int, asked: float, accuracy: float) -> dict[str, Any]:
    setting = {"model": "gru", "epochs": 4, "every": 1}
    found = {"accuracy": accuracy, "removed": asked, "parameters": 1200}
    return {"setting": setting, "seed": seed, "method": method, "asked": asked, **found}


def test_table() -> None:
    runs = [
        line("priced", 0, 0.03, 97.0),
        line("learned", 0, 0.9, 98.0),
        line("learned", 1, 0.9, 98.5),
        line("dense", 0, 0.0, 98.25),
        line("dense", 1, 0.0, 98.25),
    ]
    assert sparse_connectivity.result_table(runs).splitlines()[2:] == [
        "| gru | dense |  |  |  | 2 | 98.25 ± 0.00 |  |",
        "| gru | learned | 90.0% | 90.00% | 1,200 | 2 | 98.25 ± 0.35 | +0.00 ± 0.35 |",
        "| gru | priced | 0.03 | 3.00% | 1,200 | 1 | 97.00 | -1.25 |",
    ]


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sparse_connectivity.main(["--data", str(tmp_path)])
    assert "mnist_train.npz" in capsys.readouterr().err
