"""``fxprune demo``: a small GRU learns to read digits, is pruned, and is measured.

The data are the 1,797 handwritten digits that ship with scikit-learn, 8 x 8 pixels each. The
model reads an image row by row, as a sequence of 8 steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fxprune.errors import ConfigError
from fxprune.onnx_session import start_session
from fxprune.randomness import preserved_random_state
from fxprune.tables import render_pairs, render_table

if TYPE_CHECKING:
    from fxprune.training import Task

__all__ = ["DigitReader", "Digits", "load_digits", "make_task", "run"]

POLICY = "magnitude{sparsity=0.6,structure=neuron}"
_BATCH = 32

Batch = tuple[Tensor, Tensor]


class DigitReader(nn.Module):
    """A GRU of two layers between two linear ones."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.gru = nn.GRU(32, hidden, num_layers=2, batch_first=True)
        self.classify = nn.Linear(hidden, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Maps images [batch, rows, 8] to scores [batch, 10]."""
        outputs, _ = self.gru(self.embed(rows).relu())
        return self.classify(outputs[:, -1])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Digits:
    """Images [n, 8, 8] in 0..1 with their labels [n], shuffled and split."""

    train: Batch
    validation: Batch
    test: Batch


def load_digits(seed: int = 0) -> Digits:
    """Loads the digits: 1,197 to train on, 300 to choose by, 300 to judge by.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ConfigError(
            "the demo reads the handwritten digits of scikit-learn, which is not installed. "
            "Install it with: pip install scikit-learn"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = torch.from_numpy(images[order]).float().reshape(-1, 8, 8) / 16
    y = torch.from_numpy(labels[order]).long()
    cuts = (len(y) - 600, 300, 300)
    train, validation, test = zip(x.split(cuts), y.split(cuts), strict=True)
    return Digits(train, validation, test)


def make_task(digits: Digits, epochs: int) -> Task:
    """What to train on: cross-entropy, judged by the accuracy on the validation images."""
    from fxprune.training import Task

    order = torch.randperm(len(digits.train[1]), generator=torch.Generator().manual_seed(0))
    batches = [(digits.train[0][i], digits.train[1][i]) for i in order.split(_BATCH)]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def validate(model: nn.Module) -> float:
        return accuracy(model, digits.validation)

    return Task(loss, batches, validate, goal="max", optimizer=_optimizer, epochs=epochs, clip=1.0)


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


def accuracy(model: Callable[[Tensor], Tensor], data: Batch) -> float:
    """The fraction of images that are read rightly."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def run(
    output: Path, *, say: Callable[[str], None] = print, epochs: int = 20, hidden: int = 128
) -> None:
    """Trains, compiles and measures; leaves the compact ONNX file.

    Args:
        output: where the ONNX file goes.
        say: shows text to the user.
        epochs: passes over the training images, before pruning and again after it.
        hidden: units of each GRU layer.

    Raises:
        ConfigError: scikit-learn is not installed, or the file cannot be written.
    """
    import fxprune
    from fxprune.latency import compare
    from fxprune.training import fit

    digits = load_digits()
    task = make_task(digits, epochs)
    with preserved_random_state(0):
        model = DigitReader(hidden)
    say("Training a GRU that reads handwritten digits row by row ...")
    fit(model, task, name="train")

    say(f"Pruning it: {POLICY}, fine-tuned ...\n")
    example = (digits.train[0][:2],)
    compact = fxprune.compile(model, POLICY, example_inputs=example, task=task)
    say(f"{compact.report}\n")

    written = compact.save_onnx(output)
    say(f"{written}\n")
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        # Lowered the same way, so that nothing but the pruning differs.
        unpruned = fxprune.compile(model, [], example_inputs=example, progress=False)
        unpruned.save_onnx(dense)
        comparison = compare(dense, output, sizes=_sizes_of(output))
    say(f"{comparison}\n")
    say(_quality(model.eval(), compact, output, digits.test))


def _sizes_of(path: Path) -> dict[str, int]:
    """One image: 8 rows, whatever the file calls that dimension."""
    shape = start_session(path).get_inputs()[0].shape
    return {d: n for d, n in zip(shape, (1, 8, 8), strict=True) if isinstance(d, str)}


def _quality(dense: nn.Module, compact: Any, path: Path, test: Batch) -> str:
    """Accuracies on the test images, and how far the three forms of the pruned model differ."""
    session = start_session(path)
    name = session.get_inputs()[0].name

    def onnx(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    models: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": dense,
        "masked": compact.masked,
        "compact": compact.module.eval(),
        "ONNX": onnx,
    }
    rows = [(label, f"{accuracy(model, test):.1%}") for label, model in models.items()]
    with torch.no_grad():
        masked, small, lowered = (models[n](test[0]) for n in ("masked", "compact", "ONNX"))
    errors = render_pairs(
        [
            ("masked to compact", f"{float((masked - small).abs().max()):.2g} at most"),
            ("compact to ONNX", f"{float((small - lowered).abs().max()):.2g} at most"),
        ]
    )
    return f"{render_table(('model', 'test accuracy'), rows)}\n\n{errors}"
