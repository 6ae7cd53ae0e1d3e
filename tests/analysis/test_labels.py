"""Neuron arrays, and which neurons are one."""

from __future__ import annotations

import torch

from fxprune.analysis.labels import Axis, Ledger, collapse, expand, varying


def test_collapse_drops_repetition_only() -> None:
    ids = torch.arange(3).reshape(1, 3, 1).expand(2, 3, 4)
    assert torch.equal(collapse(ids), torch.arange(3).reshape(1, 3, 1))
    table = torch.arange(6).reshape(2, 3)
    assert torch.equal(collapse(table), table)
    assert collapse(torch.zeros(2, 3, dtype=torch.int64)).shape == (1, 1)
    assert torch.equal(collapse(table).expand(2, 3), table)


def test_axes_know_where_they_change() -> None:
    axis = Axis(torch.arange(3).reshape(1, 3), role=1)
    assert axis.dims == (1,)
    moved = axis.at(torch.arange(6).reshape(2, 3))
    assert (moved.dims, moved.role) == ((0, 1), 1)
    assert varying(torch.zeros(1, 1)) == ()
    assert expand(axis.ids, (4, 3)).shape == (4, 3)


def test_fresh_neurons_are_numbered_on() -> None:
    ledger = Ledger()
    assert ledger.fresh(2, 2).tolist() == [[0, 1], [2, 3]]
    assert ledger.fresh(3).tolist() == [4, 5, 6]
    assert ledger.count == 7


def test_unification_is_transitive_and_broadcasts() -> None:
    ledger = Ledger()
    a, b, c = ledger.fresh(2), ledger.fresh(2), ledger.fresh(1)
    ledger.unify(a, b)
    ledger.unify(b, a)
    assert ledger.resolve().tolist() == [0, 1, 0, 1, 4]
    ledger.unify(b, c)  # one neuron meets two
    assert ledger.resolve().tolist() == [0] * 5
    assert ledger.frozen == []


def test_a_neuron_that_meets_none_must_stay() -> None:
    ledger = Ledger()
    a = ledger.fresh(3)
    ledger.unify(a, torch.tensor([-1, 1, -1]))
    ledger.resolve()
    frozen = torch.cat([ids for ids, _ in ledger.frozen])
    assert sorted(frozen.tolist()) == [0, 2]
    assert ledger.frozen[0][1] == "meets a position that belongs to no neuron"


def test_freezing_nothing_leaves_no_trace() -> None:
    ledger = Ledger()
    ledger.freeze(torch.tensor([-1, -1]), "reason")
    assert ledger.frozen == []
    assert ledger.resolve().tolist() == []
