"""A task is checked when it is made, by name of the field and with a remedy."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fxprune.errors import ConfigError
from fxprune.training import Task
from fxprune.training.task import adam


def loss(model: nn.Module, batch: Any) -> Tensor:
    return torch.zeros(())


def validate(model: nn.Module) -> float:
    return 0.0


BATCHES = [torch.zeros(1)]


def make(**options: Any) -> Task:
    chosen = {"loss": loss, "train": BATCHES, "validate": validate, "goal": "min", **options}
    return Task(**chosen)


class Images(Dataset[Tensor]):
    """Can be indexed but not iterated: a data set is no loader."""

    def __getitem__(self, index: int) -> Tensor:
        raise IndexError


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(BATCHES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": 3}, r"Task\.loss must be callable, got 3: pass a function"),
        ({"validate": None}, r"Task\.validate must be callable"),
        ({"optimizer": "adam"}, r"Task\.optimizer must be callable, got 'adam'"),
        ({"scheduler": 0.9}, r"Task\.scheduler must be callable, got 0.9: pass a function"),
        ({"goal": "up"}, r"Task\.goal must be 'min' or 'max', got 'up': 'min' where"),
        ({"train": iter(BATCHES)}, r"Task\.train is an iterator .*pass a list"),
        ({"train": (b for b in BATCHES)}, r"Task\.train is an iterator \(generator\)"),
        ({"train": zip(BATCHES, BATCHES, strict=True)}, r"Task\.train is an iterator \(zip\)"),
        ({"train": 5}, r"Task\.train cannot be iterated \(int\): pass an iterable"),
        ({"train": Images()}, r"Task\.train cannot be iterated \(Images\).*DataLoader around"),
        ({"train": []}, r"Task\.train is empty \(list of length 0\): pass at least one"),
        ({"epochs": -1}, r"Task\.epochs must be an integer, at least 0, got -1: correct"),
        ({"epochs": 1.5}, r"Task\.epochs must be an integer"),
        ({"epochs": True}, r"Task\.epochs must be an integer"),
        ({"steps": 0}, r"Task\.steps must be an integer, at least 1, got 0"),
        ({"patience": 0}, r"Task\.patience must be an integer, at least 1"),
        ({"seed": 2**32}, r"Task\.seed must be an integer, from 0 to 4294967295"),
        ({"seed": None}, r"Task\.seed must be an integer, got None: leave it out"),
        ({"clip": 0}, r"Task\.clip must be a positive, finite gradient norm, got 0: leave"),
        ({"clip": float("nan")}, r"Task\.clip must be"),
        ({"clip": "1"}, r"Task\.clip must be"),
        ({"checkpoint": 3}, r"Task\.checkpoint must be the path of a folder, got 3"),
        ({"checkpoint": ""}, r"Task\.checkpoint must be the path"),
        ({"checkpoint": __file__}, r"Task\.checkpoint is a file.*: name a folder"),
        ({"device": "gpu"}, r"Task\.device is 'gpu', which torch does not know: use"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_making_a_task_does_not_touch_the_loader() -> None:
    before = torch.get_rng_state()
    loader = DataLoader(TensorDataset(torch.zeros(4, 1)), shuffle=True)
    assert make(train=loader).batches == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_data_of_unknown_length_is_accepted() -> None:
    assert make(train=Stream()).batches is None
    assert make(train=DataLoader(Stream())).batches is None


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 10), ({"epochs": 3}, 3), ({"steps": 7}, float("inf")), ({"epochs": 2, "steps": 7}, 2)],
)
def test_the_limit_on_epochs(options: dict[str, Any], limit: float) -> None:
    assert make(**options).max_epochs == limit


def test_better_follows_the_goal_strictly() -> None:
    low, high = make(goal="min"), make(goal="max")
    assert [low.better(1, 2), low.better(2, 1), low.better(1, 1)] == [True, False, False]
    assert [high.better(1, 2), high.better(2, 1), high.better(1, 1)] == [False, True, False]


def test_the_default_optimizer_is_the_documented_one() -> None:
    task = make()
    assert task.optimizer is adam
    optimizer = task.optimizer([nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 1e-3


def test_a_task_can_be_sent_to_another_process(tmp_path: Path) -> None:
    task = make(epochs=2, checkpoint=tmp_path, clip=1)
    copy = pickle.loads(pickle.dumps(task))
    assert (copy.epochs, copy.checkpoint, copy.clip) == (2, tmp_path, 1)
