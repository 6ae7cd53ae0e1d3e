"""Train, compile, save, load and run, in small; also run against the built wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.passes import Magnitude


class Counter(nn.Module):
    """Says whether the first feature of a sequence sums to more than zero."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 16, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, time, 2] to [batch, 2]."""
        y: Tensor = self.head(self.rnn(x)[1][-1])
        return y


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 6, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :, 0].sum(1) > 0).long()


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]), data[1])


def accuracy(model: nn.Module) -> float:
    x, y = batch(99)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def trained() -> Counter:
    torch.manual_seed(0)
    model = Counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(120):
        optimizer.zero_grad()
        loss(model, batch(step)).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def compact(trained: Counter) -> fxprune.Compact:
    task = fxprune.Task(loss, [batch(s) for s in range(40)], accuracy, goal="max", epochs=3)
    half = Magnitude(sparsity=0.5, structure="neuron")
    x, _ = batch(0)
    return fxprune.compile(trained, half, example_inputs=x[:1], task=task, progress=False)


def test_it_is_smaller_and_still_right(trained: Counter, compact: fxprune.Compact) -> None:
    assert accuracy(trained) > 0.85
    assert accuracy(compact.module) > 0.85
    assert compact.module.get_parameter("rnn.weight_hh_l0").shape == (24, 8)
    assert compact.report.parameters_after == 24 * 2 + 24 * 8 + 48 + 16 + 2
    assert compact.report.max_abs_error < 1e-5
    text = str(compact.report)
    assert "rnn.l0" in text
    assert "recurrent" in text


def test_onnx_runs_at_other_sizes(compact: fxprune.Compact, tmp_path: Path) -> None:
    report = compact.save_onnx(tmp_path / "m.onnx")
    assert report.operators["GRU"] == 1
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 1, 2), (5, 9, 2), (64, 6, 2)):
        x = torch.randn(*shape)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, compact.module(x).detach().numpy(), atol=1e-4)


def test_archives_come_back(compact: fxprune.Compact, tmp_path: Path) -> None:
    compact.save(tmp_path / "m.pt2")
    program = fxprune.load(tmp_path / "m.pt2")
    x, _ = batch(3)
    torch.testing.assert_close(program.module()(x), compact.module(x))
    again = fxprune.compile(program, "magnitude{sparsity=0.5}", progress=False)
    assert again.module.get_parameter("rnn.weight_hh_l0").shape == (12, 4)


def test_the_command_line(compact: fxprune.Compact, tmp_path: Path) -> None:
    compact.save(tmp_path / "m.pt2")

    def run(*words: str) -> str:
        # As installed: no sources beside the interpreter's working folder.
        command = [sys.executable, "-P", "-m", "fxprune.cli", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "rnn.l0" in run("inspect", "m.pt2")
    policy = "magnitude{sparsity=0.25,structure=neuron}"
    assert "parameters" in run("compile", "m.pt2", "--policy", policy, "-o", "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 10_000
    assert "magnitude" in run("passes")
