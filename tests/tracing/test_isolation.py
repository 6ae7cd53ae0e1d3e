"""Whatever runs in isolation leaves module and random state as they were."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxprune.errors import TraceError
from fxprune.tracing.isolation import constant_parameters, isolated


class Holder(nn.Module):
    """Has one of everything that forward may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.buffer: Tensor
        self.register_buffer("buffer", torch.zeros(2))
        self.absent: Tensor | None
        self.register_buffer("absent", None)
        self.plain = torch.zeros(2)
        self.items: list[Any] = [1, [torch.zeros(1)]]
        self.cache: dict[str, Any] = {"a": 1}
        self.queue: deque[Any] = deque([1], maxlen=3)
        self.seen: set[int] = {1}
        self.pair = (torch.zeros(1), [2])
        self.count = 0


def change(model: Any, how: str) -> None:
    """Does one thing that a forward might do."""
    with torch.no_grad():
        match how:
            case "attribute":
                model.new = torch.ones(1)
            case "buffer":
                model.buffer = torch.ones(2)
            case "absent":
                model.absent = torch.ones(2)
            case "in place":
                model.buffer.add_(1)
            case "plain":
                model.plain[0] = 5
            case "list":
                model.items.append(torch.ones(1))
            case "nested":
                model.items[1][0].add_(1)
            case "dict":
                model.cache["b"] = {"c": torch.ones(1)}
            case "queue":
                model.queue.append(torch.ones(1))
            case "tuple":
                model.pair[0].add_(1)
            case "inside a tuple":
                model.pair[1].append(torch.ones(1))
            case "parameter":
                model.gain = nn.Parameter(torch.ones(1))
            case "submodule":
                model.linear.hidden = torch.ones(1)


NAMES = {
    "attribute": "new",
    "buffer": "buffer",
    "absent": "absent",
    "in place": "buffer",
    "plain": "plain",
    "list": "items",
    "nested": "items",
    "dict": "cache",
    "queue": "queue",
    "tuple": "pair",
    "inside a tuple": "pair",
    "parameter": "gain",
    "submodule": "linear.hidden",
}


def looks(model: nn.Module) -> list[str]:
    return [str({k: v for k, v in vars(m).items()}) for m in model.modules()]


@pytest.mark.parametrize("how", NAMES)
def test_tensors_left_behind_are_named_and_removed(how: str) -> None:
    model = Holder()
    before, ids = looks(model), {k: id(v) for k, v in vars(model).items()}
    text = rf"forward keeps tensors on the module: {NAMES[how]}\."
    with pytest.raises(TraceError, match=text), isolated(model):
        change(model, how)
    assert looks(model) == before
    assert {k: id(v) for k, v in vars(model).items()} == ids


def test_a_check_in_the_middle() -> None:
    model = Holder()
    with isolated(model) as isolation:
        isolation.check()
        change(model, "list")
        with pytest.raises(TraceError, match="items"):
            isolation.check()
        model.items.pop()
        isolation.check()


def test_what_is_no_tensor_is_put_back_in_silence() -> None:
    model: Any = Holder().train()
    before = looks(model)
    with isolated(model):
        model.count += 1
        model.items.append(2)
        model.cache["a"] = 3
        model.seen.add(4)
        model.queue.append(5)
        model.extra = "text"
        model.eval()
        model.linear.register_forward_hook(lambda *_: None)
    assert looks(model) == before
    assert model.linear.training


def test_everything_is_put_back_on_an_error() -> None:
    model = Holder()
    before = looks(model)
    with pytest.raises(KeyboardInterrupt), isolated(model):
        for how in NAMES:
            change(model, how)
        raise KeyboardInterrupt
    assert looks(model) == before


def test_values_that_are_equal_again_are_no_change() -> None:
    model = Holder()
    with isolated(model) as isolation:
        model.buffer.add_(1).sub_(1)
        isolation.check()
    assert not model.buffer.any()


def test_random_states_are_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    model = nn.Linear(1, 1)
    states = random.getstate(), torch.get_rng_state()
    with isolated(model):
        draw()
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weights_that_torchs_hooks_compute_are_no_state() -> None:
    model = nn.Linear(2, 2)
    nn.utils.weight_norm(model)
    prune.random_unstructured(model, "bias", 0.5)
    with isolated(model):
        model(torch.zeros(1, 2))


def test_parameters_keep_their_values() -> None:
    model = nn.Linear(2, 2)
    weight, place = model.weight.detach().clone(), model.weight.data_ptr()
    with pytest.raises(TraceError, match=r"forward changes its parameters: weight\. "):
        with constant_parameters(model), torch.no_grad():
            model.weight.add_(1)
    assert torch.equal(model.weight, weight)
    assert model.weight.data_ptr() == place
    with pytest.raises(TraceError, match=r"parameters: weight\. "), constant_parameters(model):
        model.weight.data = torch.ones(2, 2)
    assert model.weight.data_ptr() == place
    with pytest.raises(KeyError), constant_parameters(model):
        model.weight.data = torch.ones(2, 2)
        raise KeyError
    assert model.weight.data_ptr() == place
    with constant_parameters(model):
        model(torch.zeros(1, 2))
    assert model.weight.data_ptr() == place
