"""The demo: its data, its model, and the whole of it in small."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fxprune import demo
from fxprune.errors import ConfigError


def test_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    digits = demo.load_digits()
    parts = (digits.train, digits.validation, digits.test)
    assert [len(labels) for _, labels in parts] == [1197, 300, 300]
    images = torch.cat([images for images, _ in parts])
    assert images.shape == (1797, 8, 8)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert len(images.unique(dim=0)) == 1797
    assert all(len(labels.unique()) == 10 for _, labels in parts)
    assert torch.equal(demo.load_digits().train[0], digits.train[0])


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match="Install it with: pip install scikit-learn"):
        demo.run(tmp_path / "demo.onnx", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_accuracy() -> None:
    scores = torch.eye(4)
    assert demo.accuracy(lambda x: x, (scores, torch.tensor([0, 1, 3, 2]))) == 0.5


def test_the_task_covers_every_training_image_once() -> None:
    pytest.importorskip("sklearn")
    digits = demo.load_digits()
    task = demo.make_task(digits, epochs=3)
    images = torch.cat([images for images, _ in task.train])
    assert torch.equal(images.unique(dim=0), digits.train[0].unique(dim=0))
    assert task.max_epochs == 3


def test_the_demo_in_small(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    said: list[str] = []
    demo.run(tmp_path / "demo.onnx", say=said.append, epochs=1, hidden=8)
    text = "\n".join(said)
    assert (tmp_path / "demo.onnx").stat().st_size > 0
    for part in (
        "parameters",
        "MACs per call",
        "recurrent",
        "gru",
        "times smaller than dense.onnx",
    ):
        assert part in text
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.endswith("% |")]
    accuracies = {name.strip(): value.strip() for name, value in rows[-4:]}
    assert accuracies.keys() == {"dense", "masked", "compact", "ONNX"}
    assert accuracies["masked"] == accuracies["compact"] == accuracies["ONNX"]
