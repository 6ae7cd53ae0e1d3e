"""A stage-wise pruning that was killed ends where the unbroken one does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.contract import Context, Facts
from fxprune.errors import ConfigError
from fxprune.passes.stage_wise import StageWise
from fxprune.pipeline import Outcome, run_passes
from fxprune.program import Program
from tests.passes import killed_stage_wise as killed_run

# A round writes 3 times in its search, 4 times in its retraining, and once when it is done: before
# anything, between generations, in an evaluation, in a training step, in the middle of writing
# each kind of file, and after each.
MOMENTS = (
    "validate-7",
    "write-2",
    "loss-3",
    "saved-7",
    "write-8",
    "saved-8",
    "validate-22",
    "loss-9",
    "saved-15",
    "saved-16",
    "validate-40",
    "saved-24",
)


@pytest.fixture(scope="module")
def program() -> Program:
    return killed_run.traced()


@pytest.fixture(scope="module")
def whole(program: Program) -> Outcome:
    return killed_run.prune(program, None, lambda what: None)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoint folders, one per moment, each left by a process that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tests.passes.killed_stage_wise", str(folder), *MOMENTS]
    subprocess.run(command, check=True, env=environment, timeout=120)
    return folder


def same(one: Outcome, other: Outcome) -> bool:
    return (
        one.program.masks.same_as(other.program.masks)
        and all(torch.equal(t, other.program.tensors[n]) for n, t in one.program.tensors.items())
        and one.refusals == other.refusals
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_the_unbroken_one(
    killed: Path, program: Program, whole: Outcome, moment: str
) -> None:
    again: list[str] = []
    resumed = killed_run.prune(program, killed / moment, again.append)
    assert whole.program is not program
    assert "did not recover" in whole.refusals[0].reason
    assert same(resumed, whole)
    (file,) = (killed / moment).iterdir()
    assert file.name.endswith("-rounds.pt")
    if moment in ("saved-8", "loss-9"):  # the first round is not repeated
        assert again.count("loss") <= 12
    if moment in ("saved-16", "validate-40"):  # nor is the second
        assert again.count("loss") == 6
    if moment == "saved-24":
        assert not again


def test_checkpoints_change_nothing_and_a_finished_run_returns_at_once(
    tmp_path: Path, program: Program, whole: Outcome
) -> None:
    moments: list[str] = []
    assert same(killed_run.prune(program, tmp_path, lambda what: None), whole)
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("-rounds.pt")
    assert same(killed_run.prune(program, tmp_path, moments.append), whole)
    assert not moments


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "seed: 7 there, 8 here"),
        ({"epochs": 9}, "epochs: 3 there, 9 here"),
        ({"optimizer": torch.optim.Adam}, "optimizer: Adam .*'lr': 0.03.* there, .*'lr': 0.001.*"),
    ],
)
def test_a_finished_run_is_no_answer_to_other_training(
    tmp_path: Path, program: Program, change: dict[str, Any], named: str
) -> None:
    killed_run.prune(program, tmp_path, lambda what: None)
    task = replace(killed_run.make_task(tmp_path, lambda what: None), **change)
    with pytest.raises(ConfigError, match=rf"another run \({named}"):
        facts = Facts(program, Context(task))
        run_passes(program, [StageWise(**killed_run.OPTIONS)], facts=facts)


def test_other_protection_is_another_run(tmp_path: Path, program: Program) -> None:
    """The groups differ, though weights and options are the same."""
    task = killed_run.make_task(tmp_path, lambda what: None)
    for protect in ([], ["head.*"]):
        policy = fxprune.Policy([StageWise(**killed_run.OPTIONS)], protect=protect)
        compact = fxprune.compile(program, policy, task=task, progress=False)
        alone = fxprune.compile(
            program, policy, task=replace(task, checkpoint=None), progress=False
        )
        assert compact.report.to_dict() == alone.report.to_dict()


def test_other_options_have_a_file_of_their_own(tmp_path: Path, program: Program) -> None:
    """Two passes in one policy start from the same weights where the first finds nothing."""
    nothing = StageWise(**{**killed_run.OPTIONS, "most": 0.0})
    passes = [nothing, StageWise(**killed_run.OPTIONS)]
    task = killed_run.make_task(tmp_path, lambda what: None)
    outcome = run_passes(program, passes, facts=Facts(program, Context(task)))
    alone = run_passes(
        program, passes, facts=Facts(program, Context(replace(task, checkpoint=None)))
    )
    assert same(outcome, alone)
    assert len(list(tmp_path.iterdir())) == 2
