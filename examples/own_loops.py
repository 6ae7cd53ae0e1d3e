"""Learn masks in a training loop of your own: plain PyTorch, Lightning, Hugging Face's Trainer.

    python -m examples.own_loops [--loop plain|lightning|trainer]

In each, three things are added to what trains the model anyway:

1. the model is prepared, and ``prepared.module`` is what the loop trains;
2. ``prepared.penalty()`` is added to the loss of every batch;
3. ``prepared.step()`` is called after every step of the optimizer.

In the end ``prepared.convert()`` gives the smaller model. The task here is made up: which of four
channels has the largest sum over the sequence. Lightning and transformers are needed for their own
loops only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fxprune

BATCH, EPOCHS, EXAMPLES = 32, 8, 1024
POLICY = "sparse-connectivity{target=0.1}"


class Reader(nn.Module):
    """A GRU, and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 32, batch_first=True)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps sequences [batch, time, 4] to scores [batch, 4]."""
        outputs, _ = self.gru(x)
        return self.out(outputs[:, -1])  # type: ignore[no-any-return]


def examples(count: int, seed: int) -> TensorDataset:
    """Sequences, float [count, 12, 4], and the channel of each that has the largest sum."""
    x = torch.randn(count, 12, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.sum(1).argmax(1))


def prepare(policy: str, data: TensorDataset) -> fxprune.Prepared:
    """The model with its masks; ``steps`` is how often the loop will call the optimizer."""
    torch.manual_seed(0)
    steps = EPOCHS * len(DataLoader(data, BATCH))
    return fxprune.prepare(Reader(), policy, example_inputs=(data[:2][0],), steps=steps)


def plain_loop(prepared: fxprune.Prepared, data: TensorDataset) -> None:
    """PyTorch as everybody writes it."""
    optimizer = torch.optim.Adam(prepared.module.parameters(), lr=1e-2)
    prepared.module.train()
    for _ in range(EPOCHS):
        for x, y in DataLoader(data, BATCH, shuffle=True):
            loss = functional.cross_entropy(prepared.module(x), y) + prepared.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            prepared.step()


def lightning_loop(prepared: fxprune.Prepared, data: TensorDataset) -> None:
    """A LightningModule; ``optimizer_step`` is what Lightning calls for each update."""
    lightning: Any = import_module("lightning")

    class Learner(lightning.LightningModule):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.model = prepared.module

        def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
            x, y = batch
            return functional.cross_entropy(self.model(x), y) + prepared.penalty()

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            prepared.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameters(), lr=1e-2)

    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, **quiet)
    trainer.fit(Learner(), DataLoader(data, BATCH, shuffle=True))


def trainer_loop(prepared: fxprune.Prepared, data: TensorDataset) -> None:
    """Hugging Face's Trainer, whose model returns its loss, with a callback for the step."""
    transformers: Any = import_module("transformers")

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = prepared.module

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            scores = self.model(x)
            loss = functional.cross_entropy(scores, labels) + prepared.penalty()
            return {"loss": loss, "logits": scores}

    class Step(transformers.TrainerCallback):  # type: ignore[misc]  # known at run time only
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            prepared.step()

    class Named(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = data[index]
            return {"x": x, "labels": y}

    with TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        transformers.Trainer(WithLoss(), options, train_dataset=Named(), callbacks=[Step()]).train()


LOOPS: Mapping[str, Callable[[fxprune.Prepared, TensorDataset], None]] = {
    "plain": plain_loop,
    "lightning": lightning_loop,
    "trainer": trainer_loop,
}


def run(loop: str, policy: str = POLICY) -> tuple[fxprune.Compact, float]:
    """Trains, converts, and judges on sequences that were not trained on; accuracy from 0 to 1."""
    data = examples(EXAMPLES, seed=0)
    prepared = prepare(policy, data)
    LOOPS[loop](prepared, data)
    compact = prepared.convert()
    x, y = examples(1000, seed=1)[:]
    with torch.no_grad():
        found = compact.module.eval()(x).argmax(1)
    return compact, float((found == y).float().mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the loops; returns the exit status."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--loop", choices=LOOPS, default="plain", help="[%(default)s]")
    parser.add_argument("--policy", default=POLICY, help="what to learn [%(default)s]")
    options = parser.parse_args(argv)
    try:
        compact, accuracy = run(options.loop, options.policy)
    except ModuleNotFoundError as error:
        parser.error(f"the loop {options.loop!r} needs a package: {error}")
    print(compact.report)
    print(f"accuracy {accuracy:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
