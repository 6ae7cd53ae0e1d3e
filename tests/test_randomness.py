"""Random state is taken, seeded and put back."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch

from fxprune.randomness import preserved_random_state, random_state, set_random_state


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_callers_random_state_is_put_back() -> None:
    state = random_state()
    expected = draw()
    set_random_state(state)
    with preserved_random_state(3):
        draw()
    assert draw() == expected


def test_the_random_state_is_put_back_after_an_error() -> None:
    state = random_state()
    expected = draw()
    set_random_state(state)
    with pytest.raises(KeyError), preserved_random_state(3):
        draw()
        raise KeyError
    assert draw() == expected


def test_a_seed_decides_what_is_drawn() -> None:
    draws = []
    for seed in (5, 5, 6):
        with preserved_random_state(seed):
            draws.append(draw())
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_without_a_seed_the_stream_goes_on() -> None:
    expected = draw_twice = []
    with preserved_random_state():
        expected = [draw(), draw()]
    draw_twice = [draw(), draw()]
    assert draw_twice == expected


def test_further_generators_are_put_back_and_not_seeded() -> None:
    own = torch.Generator().manual_seed(11)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(11))
    with preserved_random_state(0, own):
        assert torch.equal(torch.rand(2, generator=own), expected)
    assert torch.equal(torch.rand(2, generator=own), expected)


def test_a_saved_state_can_be_read_without_running_code() -> None:
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = draw()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draw() == expected
