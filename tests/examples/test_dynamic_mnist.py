"""The MNIST example: its data and models, its bookkeeping, and a run in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import dynamic_mnist, mnist
from examples.result_lines import read_results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of noise."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    random = np.random.default_rng(0)
    for part, images in (("train", mnist.HELD_OUT + 520), ("test", 500)):
        x = random.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        y = random.integers(0, 10, images)
        np.savez(folder / "mnist" / f"mnist_{part}.npz", x=x, y=y)
    return folder


def test_parts_do_not_overlap(data: Path) -> None:
    parts = mnist.read_mnist(data, every=2)
    assert [len(y) for _, y in (parts.train, parts.validation, parts.test)] == [260, 2000, 500]
    whole = mnist.read_mnist(data, every=1)
    assert torch.equal(whole.train[0][::2], parts.train[0])


def test_missing_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mnist_train\.npz and mnist_test\.npz"):
        mnist.read_mnist(tmp_path, every=1)


@pytest.mark.parametrize("name", mnist.MODELS)
def test_models_tell_digits(name: str) -> None:
    assert mnist.MODELS[name]()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_plans() -> None:
    structures = list(dynamic_mnist.planned("structures", [0], 0.5, "lenet5"))
    assert len(structures) == 1 + 2 * (9 + 3)
    assert "depth" in {
        r["structure"] for r in dynamic_mnist.planned("structures", [0], 0.5, "resnet")
    }
    assert len(list(dynamic_mnist.planned("sparsities", [0, 1, 2], 0.5, "gru"))) == 3 * (1 + 18)
    targets = [
        (r["structure"], r["sparsity"]) for r in dynamic_mnist.planned("targets", [0], 0, "")
    ]
    assert targets == [("dense", 0.0), *[("connection", 0.9)] * 2, *[("filter", 0.5)] * 2]


def test_runs_are_kept_and_not_repeated(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    parts = mnist.read_mnist(data, every=2)
    setting = dynamic_mnist.Setting("gru", 2, 1, 4)
    runs = [
        {"seed": 1, "structure": "dense", "sparsity": 0.0, "regrow": True},
        {"seed": 1, "structure": "connection+filter", "sparsity": [0.8, 0.5], "regrow": True},
    ]
    dynamic_mnist.run_missing(parts, setting, runs, out)
    first = out.read_text()
    dynamic_mnist.run_missing(parts, setting, runs, out)
    assert out.read_text() == first
    dense, pruned = read_results(out)
    assert pruned["parameters"] < dense["parameters"]
    assert pruned["regrown"].keys() == {"connection", "filter"}
    table = dynamic_mnist.result_table(read_results(out))
    assert "| connection+filter | 80% / 50% | yes | 1 |" in table
    assert json.loads(first.splitlines()[0])["setting"]["model"] == "gru"
