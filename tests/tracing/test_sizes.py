"""Example inputs at other sizes are plausible ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxprune
from fxprune.calls import Call
from fxprune.tracing.sizes import (
    at_sizes,
    candidate_sizes,
    example_sizes,
    length_inputs,
    size_label,
)
from tests.small import PackedTagger, Tagger, frames


@pytest.fixture(scope="module")
def tagger() -> fxprune.Program:
    return fxprune.trace(Tagger(), (frames(), torch.zeros(1, 2, 6)))


@pytest.fixture(scope="module")
def packed() -> fxprune.Program:
    return fxprune.trace(PackedTagger(), (frames(), torch.tensor([3, 5])))


def test_inputs_that_share_a_symbol_vary_together(tagger: fxprune.Program) -> None:
    batch, time = example_sizes(tagger)
    assert list(example_sizes(tagger).values()) == [2, 5]
    (x, state), _ = at_sizes(tagger, {batch: 4, time: 3})
    assert (x.shape, state.shape) == ((4, 3, 3), (1, 4, 6))
    assert torch.equal(x[:2], frames()[:, :3])
    assert torch.equal(x[2:], x[:2])
    (same, _), _ = at_sizes(tagger, {})
    assert torch.equal(same, frames())


def test_another_call_can_be_the_start(tagger: fxprune.Program) -> None:
    batch, _ = example_sizes(tagger)
    call: Call = ((torch.ones(2, 7, 3), torch.ones(1, 2, 6)), {})
    (x, state), _ = at_sizes(tagger, {batch: 1}, call)
    assert (x.shape, state.shape) == ((1, 7, 3), (1, 1, 6))


def test_lengths_fit_the_new_time(packed: fxprune.Program) -> None:
    batch, time = example_sizes(packed)
    assert length_inputs(packed) == {"lengths": time}
    (_, shorter), _ = at_sizes(packed, {time: 2})
    assert shorter.tolist() == [2, 2]
    (_, longer), _ = at_sizes(packed, {time: 9})
    assert longer.tolist() == [3, 9]
    (_, more), _ = at_sizes(packed, {batch: 3, time: 4})
    assert more.tolist() == [3, 4, 3]


def test_lengths_stay_sorted() -> None:
    program = fxprune.trace(PackedTagger(True), (frames(), torch.tensor([5, 3])))
    batch, time = example_sizes(program)
    (_, lengths), _ = at_sizes(program, {batch: 4, time: 7})
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    assert lengths.max() == 7


def test_tokens_stay_in_the_vocabulary() -> None:
    program = fxprune.trace(nn.Embedding(11, 4), torch.tensor([[10, 0, 7]]))
    batch, time = example_sizes(program)
    (tokens,), _ = at_sizes(program, {batch: 3, time: 8})
    assert tokens.dtype == torch.int64
    assert set(tokens.flatten().tolist()) == {0, 7, 10}


def test_candidates_cover_one_small_and_large() -> None:
    candidates = candidate_sizes({"b": 2, "t": 5})
    assert {"b": 1, "t": 1} in candidates
    assert {"b": 2, "t": 5} not in candidates
    assert len(candidates) == len({tuple(c.values()) for c in candidates})
    assert any(c["b"] == 1 and c["t"] > 1 for c in candidates)
    assert any(c["t"] > 5 and c["b"] != 2 for c in candidates)
    assert all(n >= 1 for c in candidate_sizes({"b": 1, "t": 1}) for n in c.values())
    assert candidate_sizes({}) == []


def test_labels() -> None:
    assert size_label({"s0": 3, "s1": 7}, {"s0": "batch"}) == "batch=3, s1=7"
