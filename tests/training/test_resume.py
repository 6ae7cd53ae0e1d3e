"""A run that was killed ends where the unbroken run does; foreign checkpoints are refused."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from fxprune.errors import ConfigError, TrainingError
from fxprune.training import FitResult, Task, fit

SCRIPT = Path(__file__).with_name("killed_run.py")

# 4 batches an epoch, 3 epochs: in epoch 1 before any checkpoint, in the middle of epochs 2 and 3,
# in a validation, half-way through writing, between two epochs, after the last write. With each
# moment, the number of epochs that are trained after the resume.
REPLAYED = {
    "loss-2": 3,
    "loss-7": 2,
    "loss-11": 1,
    "validate-4": 1,
    "write-1": 3,
    "write-3": 1,
    "write-4": 0,
    "saved-2": 1,
    "saved-4": 0,
}


def ignore(what: str) -> None:
    pass


@pytest.fixture(scope="module")
def train() -> Callable[..., tuple[nn.Module, FitResult]]:
    function: Callable[..., tuple[nn.Module, FitResult]] = runpy.run_path(str(SCRIPT))["train"]
    return function


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoint folders, one per moment, each left by a process that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SCRIPT), str(folder), *REPLAYED]
    subprocess.run(command, check=True, env=environment, timeout=120)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("moment", REPLAYED)
def test_a_killed_run_ends_as_the_unbroken_one(
    killed: Path, train: Callable[..., tuple[nn.Module, FitResult]], moment: str
) -> None:
    losses: list[str] = []
    whole, expected = train(None, ignore)
    resumed, result = train(killed / moment, losses.append)
    assert expected.best_epoch == 2  # neither the first nor the last: all that is saved matters
    assert replace(result, seconds=0) == replace(expected, seconds=0)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert losses.count("loss") == 4 * REPLAYED[moment]


def test_checkpoints_do_not_change_the_run(
    tmp_path: Path, train: Callable[..., tuple[nn.Module, FitResult]]
) -> None:
    plain, expected = train(None, ignore)
    saved, result = train(tmp_path, ignore)
    assert result.metrics == expected.metrics
    for name, tensor in plain.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name


def test_a_finished_run_returns_at_once(
    tmp_path: Path, train: Callable[..., tuple[nn.Module, FitResult]]
) -> None:
    moments: list[str] = []
    first, expected = train(tmp_path, ignore)
    second, result = train(tmp_path, moments.append)
    assert moments == []
    assert replace(result, seconds=0) == replace(expected, seconds=0)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def linear(seed: int = 0, width: int = 2) -> nn.Module:
    module = nn.Linear(3, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def square(model: nn.Module, batch: Any) -> Tensor:
    value: Tensor = model(batch).square().mean()
    return value


def task(folder: Path, **options: Any) -> Task:
    batches = [torch.ones(2, 3), torch.zeros(2, 3)]
    chosen: dict[str, Any] = {"goal": "min", "epochs": 1, **options}
    return Task(
        square, batches, lambda m: float(square(m, batches[0])), checkpoint=folder, **chosen
    )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def warm_up(optimizer: Optimizer) -> schedulers.LRScheduler:
    return schedulers.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))


def several(optimizer: Optimizer) -> schedulers.LRScheduler:
    first, second = warm_up(optimizer), schedulers.MultiStepLR(optimizer, [2, 3])
    return schedulers.SequentialLR(optimizer, [first, second], [3])


SCHEDULERS = {
    "lambda": warm_up,
    "steps": lambda o: schedulers.MultiStepLR(o, [1, 3, 5], gamma=0.3),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=8),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.3, step_size_up=2, cycle_momentum=False),
    "several": several,
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_schedule_goes_on_where_it_was(tmp_path: Path, kind: str) -> None:
    steps: list[int] = []

    def stops(model: nn.Module, batch: Any) -> Tensor:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return square(model, batch)

    options: dict[str, Any] = {"epochs": 4, "scheduler": SCHEDULERS[kind], "optimizer": sgd}
    whole, resumed = linear(), linear()
    fit(whole, task(tmp_path / "whole", **options), progress=False)
    broken = task(tmp_path / "broken", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(linear(), replace(broken, loss=stops), progress=False)
    fit(resumed, broken, progress=False)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("module", "options", "named"),
    [
        (linear(width=4), {}, r"tensors: .*weight\[2, 3\].* there, .*weight\[4, 3\].* here"),
        (linear(seed=1), {}, "weights before training"),
        (linear(), {"epochs": 2}, "epochs: 1 there, 2 here"),
        (linear(), {"seed": 4}, "seed: 0 there, 4 here"),
        (linear(), {"goal": "max"}, "goal: min there, max here"),
        (linear(), {"scheduler": warm_up}, "scheduler: None there, LambdaLR .* here"),
        (linear(), {"optimizer": sgd}, "optimizer: Adam .* there, SGD .* here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, module: nn.Module, options: dict[str, Any], named: str
) -> None:
    fit(linear(), task(tmp_path), progress=False)
    before = (tmp_path / "fine-tune.pt").read_bytes()
    with pytest.raises(ConfigError, match=rf"belongs to another run \(.*{named}.*delete it"):
        fit(module, task(tmp_path, **options), progress=False)
    assert (tmp_path / "fine-tune.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(linear(), task(tmp_path), progress=False)
    path = tmp_path / "fine-tune.pt"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ConfigError, match=r"cannot be read .*: delete it to start afresh"):
        fit(linear(), task(tmp_path), progress=False)


@pytest.mark.parametrize("content", [{"weights": torch.ones(2)}, [1, 2], {"format": 1}])
def test_another_programs_file_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "fine-tune.pt")
    with pytest.raises(ConfigError, match="is not a checkpoint of fxprune"):
        fit(linear(), task(tmp_path), progress=False)


@pytest.mark.parametrize("content", [b"hello world\n", b"a.", b"X\xff\xff", b""])
def test_a_file_of_any_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fine-tune.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be read .*: delete it"):
        fit(linear(), task(tmp_path), progress=False)


class Hostile:
    """Runs code where a pickle is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_hostile_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save(Hostile(tmp_path / "run"), tmp_path / "fine-tune.pt")
    with pytest.raises(ConfigError, match="cannot be read"):
        fit(linear(), task(tmp_path), progress=False)
    assert not (tmp_path / "run").exists()


def test_names_tell_the_fits_in_one_folder_apart(tmp_path: Path) -> None:
    fit(linear(), task(tmp_path), progress=False, name="first: 1/2")
    fit(linear(1), task(tmp_path), progress=False, name="second")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first-1-2.pt", "second.pt"]


def test_a_long_name_is_cut_and_tells_apart(tmp_path: Path) -> None:
    for end in ("a", "b", "é"):
        fit(linear(), task(tmp_path), progress=False, name="x" * 300 + end)
    assert len(list(tmp_path.iterdir())) == 3


def test_another_function_of_the_same_weights_is_another_run(tmp_path: Path) -> None:
    """Seeded alike, a model with another activation has all tensors in common."""
    models = [nn.Sequential(linear(), act) for act in (nn.Tanh(), nn.Sigmoid())]
    fit(models[0], task(tmp_path), progress=False)
    with pytest.raises(ConfigError, match=r"another run .*architecture"):
        fit(models[1], task(tmp_path), progress=False)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"folder .* cannot be made .*: name one"):
        fit(linear(), task(tmp_path / "file" / "folder"), progress=False)


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, 0

    def full_disk(content: object, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(TrainingError, match=r"cannot be written .*No space left.*run again"):
        fit(linear(), task(tmp_path, epochs=3), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["fine-tune.pt"]
    result = fit(linear(), task(tmp_path, epochs=3), progress=False)
    assert result.epochs == 3
