"""The MNIST images of the examples, and the rate that models are trained at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from examples import mnist


def test_images_are_normalized_and_every_one_is_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for part, count in (("train", 520), ("test", 100)):
        pixels, digits = numbers.integers(0, 256, (count, 28, 28)), numbers.integers(0, 10, count)
        pixels[:, 0, 0] = 0
        path = tmp_path / "mnist" / f"mnist_{part}.npz"
        np.savez(path, x=pixels.astype(np.uint8), y=digits.astype(np.uint8))
    monkeypatch.setattr(mnist, "BATCH", 32)
    x, y = mnist.read_mnist(tmp_path, every=1, held_out=100).train
    assert (x.shape, x.dtype, y.dtype) == ((420, 1, 28, 28), torch.float32, torch.int64)
    assert float(x.min()) == pytest.approx(-0.1307 / 0.3081)
    batches = mnist.Shuffled((x, torch.arange(420)))
    drawn = torch.cat([numbers for _, numbers in batches])
    assert len(batches) == 13
    assert len(drawn.unique()) == len(drawn) == 13 * 32


def test_the_rate_falls_to_zero_over_the_last_quarter() -> None:
    adam = mnist.adam([torch.nn.Parameter(torch.zeros(1))])
    scheduler = mnist.falling(8, adam)
    rates = []
    for _ in range(9):
        rates.append(scheduler.get_last_lr()[0] / 1e-3)
        adam.step()
        scheduler.step()
    assert rates == [1.0] * 7 + [0.5, 0.0]
