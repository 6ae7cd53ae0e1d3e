"""Selection against sorting, over random scores with many ties and several chunks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxprune.analysis import ConnectionClass
from fxprune.masking import prunable
from fxprune.masking.prunable import Weight
from fxprune.masking.selection import removal_count, select_connections, select_lowest


@pytest.mark.parametrize(
    ("sparsity", "n", "count"),
    [(0, 9, 0), (0.5, 9, 4), (0.29, 100, 29), (0.9, 10, 9), (0.999, 3, 2)],
)
def test_removal_count(sparsity: float, n: int, count: int) -> None:
    assert removal_count(sparsity, n) == count


CANDIDATES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12)


@given(CANDIDATES, st.booleans(), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1 - 1e-12]))
def test_lowest_of_each_scope_go_but_never_all_of_a_group(
    candidates: list[tuple[int, int]], together: bool, sparsity: float
) -> None:
    group = torch.tensor([g for _, g in candidates], dtype=torch.int64)
    scores = torch.tensor([float(s) for s, _ in candidates], dtype=torch.float64)
    scope = torch.zeros_like(group) if together else group
    floor = torch.tensor([True, True, False])
    removed, floored = select_lowest(scores, scope, group, floor, sparsity)

    best = {
        g: max((int(s), i) for i, (s, h) in enumerate(candidates) if h == g)[1]
        for g in (0, 1)
        if g in group.tolist()
    }
    expected: set[int] = set()
    spared: set[int] = set()
    for number in set(scope.tolist()):
        order = sorted((s, i) for i, (s, _) in enumerate(candidates) if scope[i] == number)
        asked = math.floor(sparsity * len(order) + 1e-9)
        expected |= set([i for _, i in order if i not in best.values()][:asked])
        spared |= {g for g, i in best.items() if i in [j for _, j in order[:asked]]}
    assert set(removed.nonzero().flatten().tolist()) == expected
    assert set(floored.nonzero().flatten().tolist()) == spared


def make_weight(name: str, rows: int, dtype: torch.dtype) -> Weight:
    values = (torch.randn(rows, 7) * 3).round().to(dtype)
    axes = torch.arange(rows).reshape(-1, 1), torch.arange(100, 107).reshape(1, -1)
    mask = torch.rand(rows, 7) < 0.8
    dead = torch.zeros(107, dtype=torch.bool)
    dead[[1, 103]] = True
    return Weight(name, values, axes, ConnectionClass.FEEDFORWARD, (0,), mask, dead)


@pytest.mark.parametrize("chunk", [1, 20, 1 << 18])
@pytest.mark.parametrize("wide", [False, True])
def test_smallest_connections_go(chunk: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunable, "CHUNK", chunk)
    weights = [
        make_weight("a", 11, torch.float64 if wide else torch.float32),
        make_weight("b", 5, torch.bfloat16),
    ]
    candidates = []
    for number, weight in enumerate(weights):
        assert weight.mask is not None
        open_ = weight.mask.clone()
        open_[1] = False
        open_[:, 3] = False
        for i, j in open_.nonzero().tolist():
            candidates.append((abs(float(weight.tensor[i, j])), number, i, j))
    keep = select_connections(weights, 0.6)
    gone = {
        (n, i, j)
        for n, weight in enumerate(weights)
        for i, j in (~keep[weight.name]).nonzero().tolist()
    }
    expected = sorted(candidates)[: math.floor(0.6 * len(candidates) + 1e-9)]
    assert gone == {(n, i, j) for _, n, i, j in expected}
