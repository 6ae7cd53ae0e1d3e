"""Two processes that train together learn the same masks, or are told that they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.learning.two_processes import POLICIES, batches, prepare, state_of, train

ROOT = Path(__file__).parents[2]
SECONDS = 300  # two processes import torch and trace models on whatever machine this is


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.learning.two_processes"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("how", ["broadcast", "reduced"])
def test_masks_and_weights_agree(name: str, how: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name][how] for rank in ranks)
    assert first["sparsity"] == second["sparsity"] > 0.1
    assert first["state"].keys() == second["state"].keys()
    for key, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][key]), key


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "neuron-selection"])
def test_two_processes_learn_what_one_would_of_all_data(
    name: str, ranks: list[dict[str, Any]]
) -> None:
    """Gates that are drawn at random are drawn in each process; all else is a mean."""
    alone = prepare(POLICIES[name])
    both = [torch.cat(pair, dim=1) for pair in zip(batches(0), batches(1), strict=True)]
    train(alone, alone.module, both)
    state = ranks[0][name]["reduced"]["state"]
    for key, tensor in state_of(alone).items():
        # Weights are in double precision, mask variables in single.
        torch.testing.assert_close(state[key].double(), tensor.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_disagreement_is_refused(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "the processes disagree about the masks (2 versions over 2" in rank[name]["apart"]


@pytest.mark.parametrize("name", POLICIES)
def test_accelerate_trains_the_same(name: str, ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    for rank in ranks:
        found = rank[name]
        assert found["accelerated"]["sparsity"] == found["broadcast"]["sparsity"]
        for key, tensor in found["broadcast"]["state"].items():
            assert torch.equal(found["accelerated"]["state"][key], tensor), key
