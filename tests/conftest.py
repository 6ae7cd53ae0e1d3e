"""What every test relies on: one thread, fixed seeds, hypothesis profiles, reference data."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers share the cores, and the order of sums must not depend on how many there are.
torch.set_num_threads(1)

# A first trace is slow and the rest fast, so hypothesis' own limits on time say nothing here.
settings.register_profile(
    "ci",
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    max_examples=300,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Give every test the same random numbers, whichever worker runs it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the reference data; without it the test is skipped, with the reason."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("FXPRUNE_DATA", beside_checkout))
    if not path.is_dir():
        pytest.skip(f"no reference data at {path}: set FXPRUNE_DATA to their folder")
    return path
