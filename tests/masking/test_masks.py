"""Masks only ever cut more."""

from __future__ import annotations

import torch

from fxprune.masking.masks import Masks


def test_empty_masks_prune_nothing() -> None:
    assert Masks().empty
    assert Masks(connections={"w": torch.ones(2, 2, dtype=torch.bool)}).empty
    assert not Masks().cut_neurons(torch.tensor([1])).empty
    assert not Masks(connections={"w": torch.zeros(2, dtype=torch.bool)}).empty


def test_cut_neurons_are_sorted_and_counted_once() -> None:
    masks = Masks().cut_neurons(torch.tensor([5, 1])).cut_neurons(torch.tensor([3, 5]))
    assert masks.neurons.tolist() == [1, 3, 5]


def test_a_connection_stays_where_both_masks_keep_it() -> None:
    first = Masks().cut_connections({"w": torch.tensor([True, True, False])})
    second = first.cut_connections(
        {"w": torch.tensor([True, False, True]), "v": torch.tensor([False])}
    )
    assert second.connections["w"].tolist() == [True, False, False]
    assert second.connections["v"].tolist() == [False]
    assert first.connections["w"].tolist() == [True, True, False]


def test_masks_are_compared_by_value() -> None:
    masks = Masks(torch.tensor([1]), {"w": torch.tensor([True, False])})
    assert masks.same_as(Masks(torch.tensor([1]), {"w": torch.tensor([True, False])}))
    assert not masks.same_as(Masks(torch.tensor([2]), {"w": torch.tensor([True, False])}))
    assert not masks.same_as(Masks(torch.tensor([1]), {"w": torch.tensor([True, True])}))
    assert not masks.same_as(Masks(torch.tensor([1])))
